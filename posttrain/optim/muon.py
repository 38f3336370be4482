"""Muon as DeepSeek-V4 uses it, with AdamW for everything that is not a matrix (V4 report, section 5.5).

    M_t = mu M_{t-1} + G_t
    O   = HybridNewtonSchulz(mu M_t + G_t) * sqrt(max(n, m)) * 0.18
    W   = W (1 - lr * decay) - lr * O

The Newton-Schulz iteration replaces the update's singular values by values near one: eight steps with
coefficients that grow small singular values fast, then two that settle them at one. Matrices of one shape,
the experts of a 3-D weight among them, go through it together in one batched product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from posttrain.kernels.newton_schulz.op import newton_schulz

UPDATE_RMS = 0.18
"""Root mean square of an update's entries in units of the rate, so that AdamW's rates carry over."""

GPU_BATCH = 2**28
"""Entries of matrices whose updates a GPU computes, and holds beside the model, at a time."""


def orthogonalize(matrices_KNM: Tensor) -> Tensor:
    """Hybrid Newton-Schulz iteration: `U S V^T` becomes about `U V^T`, for every matrix of the batch.

    `matrices_KNM` has shape [K, N, M]; so has the result. A zero matrix stays zero. On a GPU it runs in bf16.
    """
    return newton_schulz(matrices_KNM)


def _batches(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Parameters that go through the iteration together: all on the CPU, `GPU_BATCH` entries or one on a GPU."""
    batches: list[list[Tensor]] = [[]]
    entries = 0
    for parameter in parameters:
        entries += parameter.numel()
        if batches[-1] and parameter.is_cuda and entries > GPU_BATCH:
            batches.append([])
            entries = parameter.numel()
        batches[-1].append(parameter)
    return batches


class Muon(torch.optim.Optimizer):
    """One optimizer with two kinds of parameter groups, told apart by the key `kind`.

    `muon` groups: keys `lr`, `momentum`, `weight_decay`, and `blocks`, one number for each parameter: how many
    equal matrices are stacked along the rows of each of its last two dimensions (a fused gate-and-up projection has 2,
    most have 1). `adamw` groups: `lr`, `betas`, `eps`, `weight_decay`. Schedulers, gradient clipping and checkpoints
    treat it as any other optimizer.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, defaults={"lr": 1e-3, "weight_decay": 0.0})
        for group in self.param_groups:
            if group["kind"] == "muon" and len(group["blocks"]) != len(group["params"]):
                raise ValueError("a muon group needs one entry of `blocks` for each parameter")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self._muon_step if group["kind"] == "muon" else self._adamw_step)(group)
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for parameter, blocks in zip(group["params"], group["blocks"], strict=True):
            if parameter.grad is not None:
                by_shape[parameter.size(-2) // blocks, parameter.size(-1)].append(parameter)
        for shape, members in by_shape.items():
            for batch in _batches(members):
                self._update(group, batch, shape)

    def _update(self, group: dict[str, Any], parameters: list[Tensor], shape: tuple[int, int]) -> None:
        """One step of parameters that consist of matrices of one shape."""
        stacks = [self._nesterov(parameter, group["momentum"]).view(-1, *shape) for parameter in parameters]
        update_KNM = orthogonalize(torch.cat(stacks) if len(stacks) > 1 else stacks[0])
        update_KNM *= UPDATE_RMS * max(shape) ** 0.5
        parts = update_KNM.split([matrices.size(0) for matrices in stacks])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(part.reshape(parameter.shape), alpha=-group["lr"])

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        """The momentum after this gradient, and this gradient once more."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(momentum).add_(parameter.grad)
        return parameter.grad.add(state["momentum"], alpha=momentum)

    def _adamw_step(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(
                    step=torch.zeros(()), mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter)
                )
        gradients = [parameter.grad for parameter in parameters]
        means = [self.state[parameter]["mean"] for parameter in parameters]
        squares = [self.state[parameter]["square"] for parameter in parameters]
        (beta_mean, beta_square), rate = group["betas"], group["lr"]
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        torch._foreach_lerp_(means, gradients, 1 - beta_mean)
        torch._foreach_mul_(squares, beta_square)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta_square)
        # a parameter that had no gradient for a while is younger than the others, so each counts its own steps
        for parameter, mean, square in zip(parameters, means, squares, strict=True):
            count = self.state[parameter]["step"].add_(1).item()
            denominator = (square / (1 - beta_square**count)).sqrt_().add_(group["eps"])
            parameter.addcdiv_(mean, denominator, value=-rate / (1 - beta_mean**count))
