"""Divergence and log-probability over V4's vocabulary, against TRL's chunked kernels and against dense logits.

TRL's kernels are taken from where it is installed, or from the file `TRL_CHUNKED_DIVERGENCE` (its
`kernels/chunked_divergence.py`, with `chunked_logprob.py` beside it); these two need nothing else of TRL.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import copy_ceiling, matmul_ceiling, peak_bytes, seconds
from posttrain.kernels import divergence_gradients, linear_divergence, linear_logprob
from posttrain.kernels.vocabulary import oracle
from posttrain.kernels.vocabulary.op import BETA, DivergenceKind

VOCABULARY, WIDTH, TOKENS = 129_280, 4096, 8192
CHECKED = 64
"""Tokens whose values and gradients are compared with dense logits in fp64."""

ELEMENTWISE_BYTES = 30
"""Of an entry of the [N, V] matrices, once the matrix products have been counted apart; see the docs page."""

Run = Callable[..., tuple[Tensor, Tensor]]
Inputs = list[Tensor]


def trl_file() -> str | None:
    """Where TRL's `chunked_divergence.py` is, found without importing TRL."""
    if named := os.environ.get("TRL_CHUNKED_DIVERGENCE"):
        return named
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return None
    return str(Path(found.origin).parent / "kernels" / "chunked_divergence.py")


def trl_kernels(path: str) -> tuple[ModuleType, ModuleType]:
    """TRL's `chunked_divergence` and `chunked_logprob`, from these two files alone."""
    for name in ("trl_files", "trl_files.kernels", "trl_files.trainer"):
        sys.modules[name] = package = ModuleType(name)
        package.__path__ = []
    utils = ModuleType("trl_files.trainer.utils")
    utils.maybe_gather_lm_head_ctx = lambda *parameters: nullcontext()  # type: ignore[attr-defined]
    sys.modules[utils.__name__] = utils
    logprob, divergence = (_load(f"trl_files.kernels.{name}", path) for name in ("chunked_logprob", Path(path).stem))
    return divergence, logprob


def _load(name: str, beside: str) -> ModuleType:
    file = Path(beside).with_name(name.rpartition(".")[2] + ".py")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"TRL_CHUNKED_DIVERGENCE: {file} is not a Python file")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def models(tokens: int) -> Inputs:
    """States and heads in bf16, logits of standard deviation 2.5; the teacher is the student's neighbour."""
    torch.manual_seed(0)
    hidden_NH = torch.randn(tokens, WIDTH, device="cuda")
    head_VH = torch.randn(VOCABULARY, WIDTH, device="cuda").mul_(2.5 * WIDTH**-0.5)
    near_NH = hidden_NH + 0.3 * torch.randn_like(hidden_NH)
    near_VH = head_VH + 0.3 * torch.randn_like(head_VH).mul_(2.5 * WIDTH**-0.5)
    return [tensor.bfloat16() for tensor in (hidden_NH, head_VH, near_NH, near_VH)]


def both_ways(run: Run, inputs: Inputs) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
    """Forward and backward of the mean of the first result; gives the gradients of the first two inputs."""

    def call() -> tuple[Tensor | None, Tensor | None]:
        leaves = [tensor.detach().requires_grad_(number < 2) for number, tensor in enumerate(inputs)]
        run(*leaves)[0].mean().backward()
        return leaves[0].grad, leaves[1].grad

    return call


def cost(call: Callable[[], object], products: int, tokens: int, quick: bool) -> dict[str, float]:
    """Milliseconds, peak memory beside the inputs, and the share of the matmul ceiling by counted operations."""
    peak = peak_bytes(call)
    time = seconds(call, repeats=5 if quick else 15, warm_up=2)
    operations = products * 2 * tokens * VOCABULARY * WIDTH
    return {"ms": 1e3 * time, "peak_gb": peak / 1e9, "of_matmul_ceiling": operations / time / matmul_ceiling()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖."""
    return float((actual.double() - expected).norm() / expected.norm())


def errors(run: Run, inputs: Inputs, beta: float) -> dict[str, float]:
    """Against dense logits in fp64, on the first tokens: of the values, of their mean, and of the gradients."""
    student_NH, head_VH, teacher_NG, teacher_head_VG = inputs
    few = [student_NH[:CHECKED], head_VH, teacher_NG[:CHECKED], teacher_head_VG]
    by_states, by_head = both_ways(run, few)()
    assert by_states is not None and by_head is not None
    with torch.no_grad():
        value_N = run(*few)[0].double()
    double = [few[0].double().requires_grad_(), few[1].double().requires_grad_()]
    log_q_NV = oracle.log_softmax(few[2].double(), few[3].double(), 1.0)
    log_p_NV = oracle.log_softmax(double[0], double[1], 1.0)
    expected_N = oracle.divergence(log_p_NV, log_q_NV, beta)
    expected_N.mean().backward()
    expected_N = expected_N.detach()
    return {
        "largest of a token": float(((value_N - expected_N).abs() / expected_N.abs()).max()),
        "mean": float((value_N.mean() / expected_N.mean() - 1).abs()),
        "gradient in states": relative_error(by_states, double[0].grad),
        "gradient in head": relative_error(by_head, double[1].grad),
    }


def measure_divergence(kind: DivergenceKind, inputs: Inputs, trl: ModuleType | None, quick: bool) -> dict[str, Any]:
    """Ours through autograd and in one go, and TRL's; forward and backward."""
    tokens = len(inputs[0])

    def ours(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return linear_divergence(kind, *tensors)

    weights_N = torch.full((tokens,), 1 / tokens, device="cuda")
    found: dict[str, Any] = {
        "linear_divergence": cost(both_ways(ours, inputs), 4, tokens, quick)
        | {"error": errors(ours, inputs, BETA[kind])}
    }
    with torch.no_grad():
        found["linear_divergence, forward"] = cost(lambda: ours(*inputs), 2, tokens, quick)
    student_NH, head_VH, teacher_NG, teacher_head_VG = inputs
    at_once = partial(divergence_gradients, kind, student_NH, head_VH, teacher_NG, teacher_head_VG, weights_N)
    found["divergence_gradients"] = cost(at_once, 4, tokens, quick)
    if trl is not None:

        def theirs(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            student_NH, head_VH, teacher_NG, teacher_head_VG = tensors
            arguments = student_NH, head_VH, None, teacher_NG, teacher_head_VG, None, BETA[kind]
            return trl.ChunkedDivergenceFunction.apply(*arguments)

        # As many products as the method needs: what TRL computes twice counts once.
        found["trl"] = cost(both_ways(theirs, inputs), 4, tokens, quick) | {"error": errors(theirs, inputs, BETA[kind])}
        found["speed, times trl's"] = found["trl"]["ms"] / found["linear_divergence"]["ms"]
        found["memory, of trl's"] = found["linear_divergence"]["peak_gb"] / found["trl"]["peak_gb"]
    return found


def dense(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """The reverse KL from logits held in full, as one would write it."""
    log_p_NV, log_q_NV = (
        torch.log_softmax((hidden @ head.T).float(), -1) for hidden, head in (tensors[:2], tensors[2:])
    )
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1), log_p_NV


def measure_logprob(inputs: Inputs, trl: ModuleType | None, quick: bool) -> dict[str, Any]:
    """Log-probability and entropy: for training, and for the few tokens of a decoding step."""
    hidden_NH, head_VH = inputs[:2]
    tokens = len(hidden_NH)
    tokens_N = torch.randint(VOCABULARY, (tokens,), device="cuda")

    def ours(hidden_NH: Tensor, head_VH: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(hidden_NH, head_VH, tokens_N[: len(hidden_NH)])

    with torch.no_grad():
        found: dict[str, Any] = {"forward": cost(lambda: ours(hidden_NH, head_VH), 1, tokens, quick)}
        whole = ours(hidden_NH, head_VH)
        for few in (1, 64, 256):
            time = seconds(partial(ours, hidden_NH[:few], head_VH), repeats=10, warm_up=2)
            bandwidth = head_VH.numel() * head_VH.element_size() / time
            equal = all(torch.equal(a, b[:few]) for a, b in zip(ours(hidden_NH[:few], head_VH), whole, strict=True))
            found[f"forward of {few}"] = {
                "ms": 1e3 * time,
                "of_copy_ceiling": bandwidth / copy_ceiling(),
                "bitwise as among all": equal,
            }
    found["forward and backward"] = cost(both_ways(ours, inputs[:2]), 4, tokens, quick)
    if trl is not None:

        def theirs(hidden_NH: Tensor, head_VH: Tensor) -> tuple[Tensor, Tensor]:
            arguments = hidden_NH, head_VH, None, tokens_N, 1.0, 32768, None, 1.0, ("entropy",)
            return trl.ChunkedLogProbFunction.apply(*arguments)[:2]

        with torch.no_grad():
            found["trl, forward"] = cost(lambda: theirs(hidden_NH, head_VH), 1, tokens, quick)
        found["trl, forward and backward"] = cost(both_ways(theirs, inputs[:2]), 4, tokens, quick)
    return found


def measure(quick: bool) -> dict[str, Any]:
    """Everything, at V4-Flash's head; `quick` takes fewer tokens and repeats."""
    tokens = 2048 if quick else TOKENS
    inputs, path = models(tokens), trl_file()
    divergence, logprob = (None, None) if path is None else trl_kernels(path)
    product_ms = 1e3 * 2 * tokens * VOCABULARY * WIDTH / matmul_ceiling()
    elementwise_ms = 1e3 * ELEMENTWISE_BYTES * tokens * VOCABULARY / copy_ceiling()
    found: dict[str, Any] = {
        "tokens": tokens,
        "matmul_tflops": matmul_ceiling() / 1e12,
        "copy_gb_s": copy_ceiling() / 1e9,
        "floor_ms": {"a product": product_ms, "divergence": 4 * product_ms + elementwise_ms},
        "trl": path is not None,
    }
    kinds: tuple[DivergenceKind, ...] = ("reverse_kl", "forward_kl", "jsd")
    for kind in kinds:
        found[kind] = measure_divergence(kind, inputs, divergence, quick)
    few = [inputs[0][:2048], inputs[1], inputs[2][:2048], inputs[3]]
    found["reverse_kl, dense, 2048 tokens"] = cost(both_ways(dense, few), 4, 2048, quick)
    found["logprob"] = measure_logprob(inputs, logprob, quick)
    return found


if __name__ == "__main__":
    print(json.dumps(measure(quick="--quick" in sys.argv), indent=2))
