"""Gradients that kernels add to `.grad` themselves, against those that autograd adds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from posttrain import kernels
from posttrain.kernels import gradients
from tests.triton_kit import BOUNDS, DEVICE, assert_close, normal, running

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def weights(*shapes: tuple[int, ...], dtype: torch.dtype) -> nn.ParameterList:
    """Random parameters, the same for the same shapes."""
    torch.manual_seed(0)
    return nn.ParameterList(nn.Parameter(normal(*shape, scale=0.1).to(dtype)) for shape in shapes)


def experts(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """64 tokens, two experts each, of three."""
    chosen = torch.arange(2 * len(x), device=x.device).view(-1, 2) % 3
    return kernels.moe_experts(x, chosen, torch.ones_like(chosen, dtype=torch.float32), w13, w2, 10.0)


def logprobs(x: Tensor, head: Tensor) -> Tensor:
    """Of tokens 0, 1, 2, ..."""
    return kernels.linear_logprob(x, head, torch.arange(len(x), device=x.device) % len(head))[0]


def divergence(x: Tensor, head: Tensor) -> Tensor:
    """From a teacher with another head."""
    return kernels.linear_divergence("reverse_kl", x, head, x.detach(), -head.detach())[0]


CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear": (kernels.linear, [(48, 64)]),
    "experts": (experts, [(3, 64, 64), (3, 64, 32)]),
    "experts of odd sizes": (experts, [(3, 26, 64), (3, 64, 13)]),
    "one expert": (lambda x, w13, w2: kernels.swiglu_mlp(x, w13, w2, 10.0), [(64, 64), (64, 32)]),
    "log-probability": (logprobs, [(80, 64)]),
    "divergence": (divergence, [(80, 64)]),
}


def backward_twice(name: str, dtype: torch.dtype, in_place: bool) -> list[Tensor]:
    """The gradients after two passes, the second over other tokens."""
    op, shapes = CASES[name]
    parameters = weights(*shapes, dtype=dtype)
    gradients.accumulate_in_place(parameters, in_place)
    torch.manual_seed(1)
    for _ in range(2):
        x = normal(64, 64).to(dtype).requires_grad_()
        (op(x, *parameters).float() * normal(1)).sum().backward()
        assert x.grad is not None
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_gradients_added_in_place_are_those_that_autograd_adds(name: str, dtype: torch.dtype) -> None:
    with running("triton"):
        ours, theirs = backward_twice(name, dtype, True), backward_twice(name, dtype, False)
    assert len(ours) == len(theirs) == len(CASES[name][1])
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, BOUNDS[dtype], name)


def test_the_second_pass_adds_to_the_memory_of_the_first() -> None:
    (parameter,) = weights((48, 64), dtype=torch.float32)
    gradients.accumulate_in_place(nn.ParameterList([parameter]))
    with running("triton"):
        kernels.linear(normal(64, 64), parameter).sum().backward()
        assert parameter.grad is not None
        memory = parameter.grad.data_ptr()
        once = parameter.grad.clone()
        kernels.linear(normal(64, 64), parameter).sum().backward()
    assert parameter.grad.data_ptr() == memory
    assert not torch.equal(parameter.grad, once)


def test_a_parameter_with_hooks_is_left_to_autograd() -> None:
    (parameter,) = weights((48, 64), dtype=torch.float32)
    gradients.accumulate_in_place(nn.ParameterList([parameter]))
    seen: list[Tensor] = []
    handle = parameter.register_hook(lambda gradient: seen.append(gradient))
    with running("triton"):
        kernels.linear(normal(64, 64), parameter).sum().backward()
        assert len(seen) == 1
        handle.remove()
        parameter.register_post_accumulate_grad_hook(lambda owner: seen.append(owner))
        kernels.linear(normal(64, 64), parameter).sum().backward()
    assert len(seen) == 2


def test_what_is_not_marked_or_not_a_parameter_goes_to_autograd() -> None:
    (parameter,) = weights((48, 64), dtype=torch.float32)
    assert gradients.owner_of(parameter) is None
    gradients.accumulate_in_place(nn.ParameterList([parameter]))
    assert gradients.owner_of(parameter) is parameter
    assert gradients.owner_of(parameter * 2) is None
    assert gradients.owner_of(parameter.detach()) is None
    gradients.accumulate_in_place(nn.ParameterList([parameter]), enabled=False)
    assert gradients.owner_of(parameter.to(DEVICE)) is None
