"""Triton kernels against their oracles: on a GPU where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from posttrain.kernels import backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest error, relative to the largest value: sums of some hundred terms; roundings of inputs and results to bf16."""

Op = Callable[..., Tensor | tuple[Tensor, ...]]


@contextmanager
def running(which: backend.Backend) -> Iterator[None]:
    """Run this implementation of every op."""
    backend.use(which)
    try:
        yield
    finally:
        backend.use(None)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """Random numbers on the device under test, fp32."""
    return scale * torch.randn(shape).to(DEVICE)


def assert_close(actual: Tensor, expected: Tensor, bound: float, what: str) -> None:
    """Equal up to `bound` times the largest value; infinities in the same places."""
    assert actual.shape == expected.shape, what
    if expected.numel():
        infinite = expected.isinf()
        assert torch.equal(actual.isinf(), infinite), what
        error = (actual.double() - expected.double()).masked_fill(infinite, 0).abs().max()
        size = expected.double().masked_fill(infinite, 0).abs().max()
        assert error <= bound * max(1.0, float(size)), f"{what}: {error:.2e}"


def assert_agrees(
    op: Op, oracle: Op, *inputs: Tensor, dtype: torch.dtype = torch.float32, bound: float | None = None
) -> None:
    """`op` on Triton gives what `oracle` gives in fp64 on the same (rounded) inputs; so do all gradients.

    Args:
        op: called with tensors in `dtype`.
        oracle: called with the same numbers in fp64.
        inputs: those tensors that have gradients; bind everything else into the callables.
        bound: of the error, instead of the dtype's in `BOUNDS`.
    """
    bound = BOUNDS[dtype] if bound is None else bound
    single = [tensor.detach().to(dtype).clone().requires_grad_() for tensor in inputs]
    double = [tensor.detach().double().requires_grad_() for tensor in single]
    with running("triton"):
        results = op(*single)
        expected = oracle(*double)
        results, expected = ((one,) if isinstance(one, Tensor) else one for one in (results, expected))
        for number, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
            assert_close(actual, wanted, bound, f"result {number}")
        slopes = [torch.randn_like(one).masked_fill(one.isinf(), 0) for one in results]
        torch.autograd.backward(results, slopes)
    torch.autograd.backward(expected, [slope.double() for slope in slopes])
    for number, (one, other) in enumerate(zip(single, double, strict=True)):
        wanted = torch.zeros_like(other) if other.grad is None else other.grad
        assert one.grad is not None, f"gradient {number} is missing"
        assert_close(one.grad, wanted, bound, f"gradient {number}")
