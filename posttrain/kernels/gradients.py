"""Gradients of weights, added to `.grad` by the kernel that computes them instead of by autograd.

Autograd takes a gradient as a tensor of its own and adds it in another pass. For the experts of one V4-Flash layer that
tensor has 12 GiB, and the pass reads and writes as much again: a quarter of a training step of 4k tokens.
A parameter takes part once `accumulate_in_place` has marked it. Backward passes then return no gradient for it, so
`torch.autograd.grad` finds none, and tensor hooks on it would not be called: a parameter that has hooks (as those of
data-parallel wrappers) is left to autograd, and so is whatever is not itself a parameter (a rounded or converted copy).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MARK = "accumulates_in_place"


def accumulate_in_place(module: nn.Module, enabled: bool = True) -> None:
    """Mark all parameters of a module, or unmark them."""
    for parameter in module.parameters():
        setattr(parameter, MARK, enabled)


def owner_of(weight: Tensor) -> Tensor | None:
    """The parameter whose `.grad` a backward pass is to add to; None: the gradient goes to autograd."""
    marked = getattr(weight, MARK, False) and weight.is_leaf and weight.requires_grad
    hooked = marked and (weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None))
    return weight if marked and not hooked else None


def total_of(owner: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The gradient that a kernel adds a gradient of `dtype` to; None: it writes into new memory."""
    if owner is None or owner.grad is None or owner.grad.dtype is not dtype or not owner.grad.is_contiguous():
        return None
    return owner.grad


def handed_over(owner: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """What to return to autograd: `gradient`, or None once the owner has it."""
    if owner is None or gradient is None:
        return gradient
    if owner.grad is None:
        owner.grad = gradient.to(owner.dtype)
    elif owner.grad is not gradient:
        owner.grad.add_(gradient)
    return None


def matrix_gradient(owner: Tensor | None, gradient_TO: Tensor, x_TI: Tensor) -> Tensor | None:
    """`gradientᵀ · x`, `[O, I]`, to return to autograd; one rounding where it is added to what is there."""
    total = total_of(owner, x_TI.dtype)
    if total is None:
        return handed_over(owner, torch.mm(gradient_TO.t(), x_TI))
    total.addmm_(gradient_TO.t(), x_TI)
    return None
