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

GROWING = (3.4445, -4.7750, 2.0315)
SETTLING = (2.0, -1.5, 0.5)
COEFFICIENTS = (GROWING,) * 8 + (SETTLING,) * 2
UPDATE_RMS = 0.18
"""Root mean square of an update's entries in units of the rate, so that AdamW's rates carry over."""


def orthogonalize(matrices_KNM: Tensor) -> Tensor:
    """Hybrid Newton-Schulz iteration: `U S V^T` becomes about `U V^T`, for every matrix of the batch.

    `matrices_KNM` has shape [K, N, M]; so has the result. A zero matrix stays zero.
    """
    tall = matrices_KNM.size(1) > matrices_KNM.size(2)
    x = matrices_KNM.mT if tall else matrices_KNM  # the Gram matrix is built on the shorter side
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-20)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


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
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, blocks in zip(group["params"], group["blocks"], strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
            nesterov = parameter.grad.add(state["momentum"], alpha=group["momentum"])
            matrices_KNM = nesterov.view(-1, parameter.size(-2) // blocks, parameter.size(-1))
            by_shape[matrices_KNM.shape[1:]].append((parameter, matrices_KNM))
        for shape, members in by_shape.items():
            update_KNM = orthogonalize(torch.cat([matrices for _, matrices in members]))
            update_KNM *= UPDATE_RMS * max(shape) ** 0.5
            parts = update_KNM.split([matrices.size(0) for _, matrices in members])
            for (parameter, _), part in zip(members, parts, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(part.reshape(parameter.shape), alpha=-group["lr"])

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
