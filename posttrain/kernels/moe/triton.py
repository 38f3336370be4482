"""Routers, experts and the shared expert on the GPU: what the op table calls there.

Forward: `act = swiglu(x[token] · w13ᵀ)` for all slots by expert, `rows = act · w2ᵀ` written back in the slots' order,
and each token's slots added up in that order with the router's weights, in fp32. Backward, with `g` the gradient:

    dact = g[token] · w2        and from it, by SwiGLU, row by row: dhidden, weight · act, and the router's gradient
    dw2  = gᵀ · (weight · act)     dw13 = dhiddenᵀ · x[token]      one program walks an expert's rows in their order
    dx   = dhidden · w13           written back in the slots' order and added up by token

No kernel adds to memory that another one writes, so there is nothing whose order could vary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from posttrain.kernels.compiled import differentiable
from posttrain.kernels.gradients import handed_over, matrix_gradient, owner_of, total_of
from posttrain.kernels.moe.triton_gradient import swiglu_gradient_kernel, weight_gradient_kernel
from posttrain.kernels.moe.triton_grouped import combine_kernel, gate_up_kernel, multiply_kernel
from posttrain.kernels.moe.triton_packed import packed_gate_up, packed_multiply, packed_plan
from posttrain.kernels.moe.triton_plan import Plan, make_plan, one_expert_plan
from posttrain.kernels.moe.triton_route import INTERPRETED, Route

DESCRIPTORS = True
"""Load experts' matrices, and store their gradients, by Hopper's tensor copy engine where the shape allows it; plain
loads and stores give the same bits."""

KEPT_BYTES = 2 * 2**30
"""Gate and up are kept for the backward pass up to this size, and computed again above it: then an expert has so many
rows that reading its matrix once more costs little. Both give the same bits."""

ROWS_BYTES = 2**30
"""Slots' output rows are made for as many columns at a time as this holds."""

GRADIENT_ROWS, GRADIENT_COLUMNS = 8, 256
"""At a time in SwiGLU's gradient."""


@dataclass(frozen=True)
class Tiles:
    """A tile of outputs, and how it is computed: `inner` terms at a time.

    A program computes `turns` tiles, of the same rows and of columns beside one another.
    """

    columns: int
    inner: int
    warps: int
    stages: int
    turns: int = 1

    def fitted(self, columns: int, inner: int) -> dict[str, int]:
        """A kernel's arguments, no larger than these sizes need. The number of tokens changes none of them."""
        return {
            "BLOCK_N": min(self.columns, max(16, triton.next_power_of_2(columns))),
            "BLOCK_K": min(self.inner, max(16, triton.next_power_of_2(inner))),
            "TURNS": self.turns,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# All tiles of the narrow dtypes are made of the same instruction (64 rows of `wgmma`, 16 terms at a time into one
# accumulator), so the choice among them, which is by the number of tokens, changes no bit. fp32 has one choice.
BAND = 8
ROWS = {"large": 128, "small": 64, "narrow": 64, "single": 32}
TILES = {
    ("gate_up", "large"): Tiles(128, 64, 8, 4),
    ("multiply", "large"): Tiles(256, 64, 8, 4),
    ("gate_up", "small"): Tiles(64, 64, 4, 4),
    ("multiply", "small"): Tiles(128, 64, 4, 4),
    ("gate_up", "narrow"): Tiles(16, 64, 4, 6),
    ("multiply", "narrow"): Tiles(32, 64, 4, 6),
    ("gate_up", "single"): Tiles(32, 32, 4, 2),
    ("multiply", "single"): Tiles(64, 32, 4, 2),
}
WEIGHT_TILES = {2: (128, Tiles(128, 64, 8, 3, turns=8)), 4: (64, Tiles(64, 32, 4, 2))}
"""Of weight gradients, by bytes of a number: rows of a tile, and the rest; `inner` are an expert's rows."""

ADDING_TILES = {2: (64, Tiles(128, 64, 4, 3, turns=4)), 4: WEIGHT_TILES[4]}
"""The same where they are added to what is there: several programs on a multiprocessor, so that while one waits for the
old numbers another multiplies."""


def tiles_for(rows: int, experts: int, dtype: torch.dtype) -> str:
    """Large tiles read the experts' matrices least often; small ones waste less where an expert has few rows.

    Where one expert takes all rows and these are few, only narrow tiles are as many as the GPU has multiprocessors.
    """
    if dtype.itemsize == 4:
        return "single"
    if experts == 1:
        return "narrow" if rows <= 128 else "small" if rows <= 1024 else "large"
    return "small" if rows <= 48 * experts else "large"


def _matrices(weights: Tensor, block: list[int], whole_steps: bool) -> tuple[Any, bool]:
    """All experts' matrices below each other, for the copy engine if it can serve them, and whether it can."""
    aligned = weights.data_ptr() % 16 == 0 and weights.shape[2] % 8 == 0 and weights.element_size() == 2
    if not (DESCRIPTORS and aligned and whole_steps):
        return weights, False
    return TensorDescriptor.from_tensor(weights.view(-1, weights.shape[2]), block), True


def _parts(columns: int, sizes: dict[str, int]) -> int:
    """Programs that compute so many columns of the same rows."""
    return triton.cdiv(triton.cdiv(columns, sizes["BLOCK_N"]), sizes["TURNS"])


def gate_up(x_TH: Tensor, w13_EJH: Tensor, plan: Plan, limit: float, keep: bool) -> tuple[Tensor, Tensor]:
    """`act[S, I]`, and `[gate | up][S, 2I]` if it is to be kept."""
    (experts, outer, hidden), rows = w13_EJH.shape, len(plan.order_S)
    act_SI = x_TH.new_empty(rows, outer // 2)
    hidden_SJ = x_TH.new_empty(rows, outer) if keep else act_SI
    sizes = TILES["gate_up", plan.tiles].fitted(outer // 2, hidden)
    matrices, described = _matrices(w13_EJH, [sizes["BLOCK_N"], sizes["BLOCK_K"]], True)
    gate_up_kernel[(len(plan.tile_experts_N) * _parts(outer // 2, sizes),)](
        *(x_TH, matrices, hidden_SJ, act_SI, *plan.tables, limit),
        HIDDEN=hidden,
        INNER=outer // 2,
        EXPERTS=experts,
        SLOTS=plan.slots,
        KEEP=keep,
        BLOCK_M=ROWS[plan.tiles],
        BAND=BAND,
        DESCRIBED=described,
        WIDEN=INTERPRETED,
        **sizes,
    )
    return act_SI, hidden_SJ


def multiply(
    rows_SK: Tensor, weights: Tensor, transposed: bool, plan: Plan, columns: slice, out: Tensor | None = None
) -> Tensor:
    """Columns of each row times its expert's matrix (transposed: `[E, N, K]`, else `[E, K, N]`), in slots' order.

    With `out`, rows are read by token instead, and written there in the experts' order.
    """
    by_token, inner = out is not None, rows_SK.shape[1]
    outer = weights.shape[1] if transposed else weights.shape[2]
    width = columns.stop - columns.start
    out = rows_SK.new_empty(len(rows_SK), width) if out is None else out
    sizes = TILES["multiply", plan.tiles].fitted(width, inner)
    block = [sizes["BLOCK_N"], sizes["BLOCK_K"]] if transposed else [sizes["BLOCK_K"], sizes["BLOCK_N"]]
    matrices, described = _matrices(weights, block, transposed or inner % sizes["BLOCK_K"] == 0)
    multiply_kernel[(len(plan.tile_experts_N) * _parts(width, sizes),)](
        *(rows_SK, matrices, out, *plan.tables, columns.start),
        INNER=inner,
        OUTER=outer,
        WIDTH=width,
        EXPERTS=len(weights),
        SLOTS=plan.slots,
        TRANSPOSED=transposed,
        BY_TOKEN=by_token,
        BLOCK_M=ROWS[plan.tiles],
        BAND=BAND,
        DESCRIBED=described,
        WIDEN=INTERPRETED,
        **sizes,
    )
    return out


def act_gradient(
    gradient_TH: Tensor,
    w2_EHI: Tensor,
    hidden_SJ: Tensor,
    weights_TK: Tensor,
    plan: Plan,
    limit: float,
    dhidden_SJ: Tensor,
    act_SI: Tensor,
) -> Tensor:
    """Fills `dhidden`, which may be `hidden`, and `act`, by weight; returns the gradient of the weights."""
    rows, inner = act_SI.shape
    multiply(gradient_TH, w2_EHI, False, plan, slice(0, inner), act_SI)
    dweights_TK = torch.empty_like(weights_TK) if plan.slots else weights_TK
    swiglu_gradient_kernel[(triton.cdiv(rows, GRADIENT_ROWS),)](
        *(hidden_SJ, weights_TK, dhidden_SJ, act_SI, dweights_TK, plan.order_S, plan.starts_F, rows, limit),
        INNER=inner,
        EXPERTS=plan.experts,
        SLOTS=plan.slots,
        BLOCK_M=GRADIENT_ROWS,
        BLOCK_N=min(GRADIENT_COLUMNS, triton.next_power_of_2(inner)),
    )
    return dweights_TK


def weight_gradient(
    left: Tensor, right: Tensor, plan: Plan, by_token: tuple[bool, bool], total_EMN: Tensor | None = None
) -> Tensor:
    """`[E, M, N]`, each expert's `leftᵀ · right`; a side is `[T, width]` if it is read by token, else `[S, width]`.

    Adds to `total` if that is given, and returns it.
    """
    m, n = left.shape[1], right.shape[1]
    out_EMN = left.new_empty(plan.experts, m, n) if total_EMN is None else total_EMN
    rows, tiles = (WEIGHT_TILES if total_EMN is None else ADDING_TILES)[left.element_size()]
    rows = min(rows, max(16, triton.next_power_of_2(m)))
    sizes = tiles.fitted(n, tiles.inner)
    # The copy engine leaves out columns that do not exist; a row too many would be the next expert's.
    matrices, described = _matrices(out_EMN, [rows, sizes["BLOCK_N"]], m % rows == 0)
    weight_gradient_kernel[(plan.experts * triton.cdiv(m, rows) * _parts(n, sizes),)](
        *(left, right, out_EMN, matrices, plan.order_S, plan.starts_F),
        M=m,
        N=n,
        LEFT_SLOTS=plan.slots if by_token[0] else 0,
        RIGHT_SLOTS=plan.slots if by_token[1] else 0,
        BLOCK_M=rows,
        DESCRIBED=described,
        ADD=total_EMN is not None,
        WIDEN=INTERPRETED,
        **sizes,
    )
    return out_EMN


def multiply_and_combine(
    rows_SK: Tensor, weights: Tensor, transposed: bool, plan: Plan, experts_TK: Tensor, weights_TK: Tensor | None
) -> Tensor:
    """Rows times their experts' matrices, a token's slots added up, with the router's weights if there are any."""
    outer = weights.shape[1] if transposed else weights.shape[2]
    out_TN = rows_SK.new_empty(len(experts_TK), outer)
    step = max(256, ROWS_BYTES // (len(rows_SK) * rows_SK.element_size()) // 256 * 256)
    for first in range(0, outer, step):
        columns = slice(first, min(first + step, outer))
        width = columns.stop - first
        if weights.dtype is torch.uint8:
            rows_SW = packed_multiply(rows_SK, weights, plan, columns)
        else:
            rows_SW = multiply(rows_SK, weights, transposed, plan, columns)
        block = min(1024, triton.next_power_of_2(width))
        combine_kernel[(len(experts_TK), triton.cdiv(width, block))](
            *(rows_SW, rows_SW if weights_TK is None else weights_TK, experts_TK, out_TN, first),
            EXPERTS=plan.experts,
            WIDTH=width,
            DIM=outer,
            SLOTS=plan.slots,
            WEIGHTED=weights_TK is not None,
            BLOCK=block,
        )
    return out_TN


def _nothing(ctx: Any, *inputs: Tensor) -> Tensor:
    """The result where there is no slot or no dimension to compute with, like the first input; no gradient either."""
    ctx.plan = None
    ctx.save_for_backward(*inputs)
    return torch.zeros_like(inputs[0])


def _hidden(
    x_TH: Tensor, w13_EJH: Tensor, kept_SJ: Tensor | None, plan: Plan, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up, and room for their gradient (the same if they were not kept) and for the rows between products."""
    if kept_SJ is not None:
        return kept_SJ, torch.empty_like(kept_SJ), kept_SJ.new_empty(len(kept_SJ), kept_SJ.shape[1] // 2)
    act_SI, hidden_SJ = gate_up(x_TH, w13_EJH, plan, limit, True)
    return hidden_SJ, hidden_SJ, act_SI


def _experts_gradient(
    owner: Tensor | None, left: Tensor, right: Tensor, plan: Plan, by_token: tuple[bool, bool]
) -> Tensor | None:
    total_EMN = total_of(owner, left.dtype)
    return handed_over(owner, weight_gradient(left, right, plan, by_token, total_EMN))


class _Experts(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, limit: float
    ) -> Tensor:
        rows = experts_TK.numel()
        if rows * w2.numel() == 0:
            return _nothing(ctx, x_TH, weights_TK, w13, w2)
        tiles = tiles_for(rows, len(w13), x_TH.dtype)
        plan = make_plan(experts_TK, len(w13), tiles, ROWS[tiles])
        keep = any(ctx.needs_input_grad) and rows * w13.shape[1] * x_TH.element_size() <= KEPT_BYTES
        act_SI, hidden_SJ = gate_up(x_TH, w13, plan, limit, keep)
        ctx.save_for_backward(x_TH, experts_TK, weights_TK, w13, w2, hidden_SJ if keep else None)
        ctx.plan, ctx.limit, ctx.owners = plan, limit, (owner_of(w13), owner_of(w2))
        return multiply_and_combine(act_SI, w2, True, plan, experts_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.plan is None:
            dx_TH, *others = (torch.zeros_like(one) for one in ctx.saved_tensors)
            return dx_TH, None, *others, None
        x_TH, experts_TK, weights_TK, w13, w2, kept_SJ = ctx.saved_tensors
        plan, limit, gradient_TH = ctx.plan, ctx.limit, gradients[0].contiguous()
        by_x, _, _, by_w13, by_w2, _ = ctx.needs_input_grad
        hidden_SJ, dhidden_SJ, act_SI = _hidden(x_TH, w13, kept_SJ, plan, limit)
        dweights_TK = act_gradient(gradient_TH, w2, hidden_SJ, weights_TK, plan, limit, dhidden_SJ, act_SI)
        dw2 = _experts_gradient(ctx.owners[1], gradient_TH, act_SI, plan, (True, False)) if by_w2 else None
        del act_SI
        dw13 = _experts_gradient(ctx.owners[0], dhidden_SJ, x_TH, plan, (False, True)) if by_w13 else None
        dx_TH = multiply_and_combine(dhidden_SJ, w13, False, plan, experts_TK, None) if by_x else None
        return dx_TH, None, dweights_TK, dw13, dw2, None


def _packed_experts(
    x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, limit: float
) -> Tensor:
    if experts_TK.numel() * w2.numel() == 0:
        return torch.zeros_like(x_TH)
    plan = packed_plan(x_TH, experts_TK, len(w13))
    act_SI = packed_gate_up(x_TH, w13, plan, limit)
    return multiply_and_combine(act_SI, w2, True, plan, experts_TK, weights_TK)


class _Mlp(torch.autograd.Function):
    """The experts' kernels with one expert that takes every token."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, gate_up_JH: Tensor, down_HI: Tensor, limit: float) -> Tensor:
        if x_TH.numel() * down_HI.numel() == 0:
            return _nothing(ctx, x_TH, gate_up_JH, down_HI)
        tiles = tiles_for(len(x_TH), 1, x_TH.dtype)
        plan = one_expert_plan(x_TH, tiles, ROWS[tiles])
        keep = any(ctx.needs_input_grad) and len(x_TH) * len(gate_up_JH) * x_TH.element_size() <= KEPT_BYTES
        act_TI, hidden_TJ = gate_up(x_TH, gate_up_JH.unsqueeze(0), plan, limit, keep)
        ctx.save_for_backward(x_TH, gate_up_JH, down_HI, hidden_TJ if keep else None)
        ctx.plan, ctx.limit, ctx.owners = plan, limit, (owner_of(gate_up_JH), owner_of(down_HI))
        return multiply(act_TI, down_HI.unsqueeze(0), True, plan, slice(0, len(down_HI)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.plan is None:
            return *(torch.zeros_like(one) for one in ctx.saved_tensors), None
        x_TH, gate_up_JH, down_HI, kept_TJ = ctx.saved_tensors
        plan, limit, gradient_TH = ctx.plan, ctx.limit, gradients[0].contiguous()
        by_x, by_gate_up, by_down, _ = ctx.needs_input_grad
        hidden_TJ, dhidden_TJ, act_TI = _hidden(x_TH, gate_up_JH.unsqueeze(0), kept_TJ, plan, limit)
        act_gradient(gradient_TH, down_HI.unsqueeze(0), hidden_TJ, gradient_TH, plan, limit, dhidden_TJ, act_TI)
        return (
            dhidden_TJ @ gate_up_JH if by_x else None,
            matrix_gradient(ctx.owners[0], dhidden_TJ, x_TH) if by_gate_up else None,
            matrix_gradient(ctx.owners[1], gradient_TH, act_TI) if by_down else None,
            None,
        )


def moe_experts(
    x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, w13_EJH: Tensor, w2_EHI: Tensor, limit: float
) -> Tensor:
    """See the op. In `x`'s dtype, to which the experts' matrices are converted if theirs is another and not MXFP4."""
    routes = experts_TK.long().contiguous(), weights_TK.float().contiguous()
    if w13_EJH.dtype is torch.uint8:
        return _packed_experts(x_TH.contiguous(), *routes, w13_EJH.contiguous(), w2_EHI.contiguous(), float(limit))
    w13_EJH, w2_EHI = (matrix.to(x_TH.dtype).contiguous() for matrix in (w13_EJH, w2_EHI))
    return differentiable(_Experts, x_TH.contiguous(), *routes, w13_EJH, w2_EHI, float(limit))


def swiglu_mlp(x_TH: Tensor, gate_up_JH: Tensor, down_HI: Tensor, limit: float) -> Tensor:
    """See the op. In `x`'s dtype, to which the matrices are converted if theirs is another."""
    matrices = (matrix.to(x_TH.dtype).contiguous() for matrix in (gate_up_JH, down_HI))
    return differentiable(_Mlp, x_TH.contiguous(), *matrices, float(limit))


def route_topk(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """See the op."""
    chosen_TK = torch.empty(len(x_TH), k, dtype=torch.int64, device=x_TH.device)
    inputs = x_TH.contiguous(), weight_EH.contiguous(), bias_E.float().contiguous()
    return differentiable(Route, *inputs, chosen_TK, scaling)


def route_hash(
    x_TH: Tensor, weight_EH: Tensor, table_VK: Tensor, tokens_T: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """See the op."""
    chosen_TK = table_VK[tokens_T].long().contiguous()
    return differentiable(Route, x_TH.contiguous(), weight_EH.contiguous(), None, chosen_TK, scaling)
