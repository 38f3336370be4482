"""The mHC operations on the GPU: launches and gradients. docs/kernels/mhc.md counts what they read and write.

A site goes in two steps: `project` reads all streams once, for projections and norm at the same time, in fixed
pieces of the channels; `site` adds the pieces up, turns them into weights, Sinkhorn included, and reads the streams
again to collapse them. Tiles and the order of all sums depend on shapes of features and on the dtype alone, so that
neither the number of tokens nor a gradient changes a bit of a result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from posttrain.kernels.compiled import differentiable
from posttrain.kernels.launches import Launcher
from posttrain.kernels.mhc.triton_site import site_backward_kernel
from posttrain.kernels.mhc.triton_streams import (
    collapse_backward_kernel,
    post_backward_kernel,
    post_kernel,
    project_kernel,
    site_kernel,
    streams_backward_kernel,
    sums_kernel,
)

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The interpreter multiplies bf16 as if its bits were integers; there, operands are widened first."""

PADDING = 128
"""Buffers with tokens last have room for a multiple of this many: whole tiles, and one compiled variant."""

MANY_TOKENS = 6144
"""From here on, programs of `project` that take whole pieces are enough for every multiprocessor."""

GROUP_TOKENS, GROUPS = 2048, 8
"""The gradient by fn is summed by groups of at least so many tokens, up to so many groups at once."""

SITE_WARPS, BACK_WARPS = 4, 1
"""Warps of the programs that have a token in each thread."""

SEGMENT = 5
"""Sinkhorn iterations between two matrices that the backward computes from the start: about the root of V4's 20."""


@dataclass(frozen=True)
class Tiles:
    """Sizes of tiles that tensor cores multiply, warps that work on one and tiles on their way, for one dtype.

    Sums of channels are made of pieces, and these of units; a program of `project` adds up a piece, or with few tokens
    a unit. `channels`, `unit` and `piece` decide the order of sums, and so bits.
    """

    tokens: int
    channels: int
    warps: int
    stages: int
    unit: int
    piece: int
    back_tokens: int
    back_channels: int
    back_warps: int
    back_stages: int
    post_channels: int
    post_warps: int


NARROW = Tiles(
    tokens=128,
    channels=64,
    warps=8,
    stages=4,
    unit=1024,
    piece=4096,
    back_tokens=64,
    back_channels=64,
    back_warps=4,
    back_stages=3,
    post_channels=256,
    post_warps=4,
)
SINGLE = Tiles(
    tokens=32,
    channels=32,
    warps=4,
    stages=4,
    unit=1024,
    piece=4096,
    back_tokens=16,
    back_channels=64,
    back_warps=4,
    back_stages=3,
    post_channels=64,
    post_warps=4,
)


def _kind(op: str, **tensors: Tensor) -> Tiles:
    """The tiles for these tensors' dtype, once it is known to be one, and one that kernels have."""
    (name, first), *others = tensors.items()
    if first.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{op}: {name} is {first.dtype}; expected torch.float32 or torch.bfloat16")
    for other, tensor in others:
        if tensor.dtype is not first.dtype:
            raise ValueError(f"{op}: {other} is {tensor.dtype}; expected {first.dtype}, as {name}")
    return SINGLE if first.dtype is torch.float32 else NARROW


def _same_device(op: str, first: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; expected {first.device}, as streams")


def _aligned(tensor: Tensor) -> Tensor:
    """Without gaps, and begun where the widest loads may begin.

    How wide loads are decides who sums which squares; and kernels that are launched again count on it.
    """
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _block(dim: int, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(dim)))


class _Launch:
    """A kernel with its constants, warps and stages."""

    def __init__(self, kernel: Any, options: dict[str, int], **constants: int) -> None:
        self._launcher, self._options = Launcher(kernel), options
        self._constants = {name: constants[name] for name in kernel.arg_names if name in constants}

    def __call__(self, columns: int, rows: int, *arguments: Any) -> None:
        """Launch; the first argument is a tensor of streams, which with these constants tells what is compiled."""
        self._launcher((columns, rows, 1), arguments[0].device, arguments, self._constants, **self._options)


class _Plan:
    """The kernels of a site, and the sizes of their buffers; the same for any number of tokens.

    Attributes:
        sums_of: how many sums `project` leaves for each row, with many tokens and with few.
        rows: of a buffer of partial sums: the projections, the sum of squares, and up to what a tensor core multiplies.
        kept: rows of `mixes`: projections, sum of squares, weights pre.
        sums: room for the sums by base and scale.
        fn_dtype: of the gradient by fn; another plan for another, as `add` is compiled for one.
    """

    def __init__(self, n: int, dim: int, width: int, iterations: int, fn_dtype: torch.dtype, tiles: Tiles) -> None:
        self.dim, self.width, self.tiles, self.fn_dtype = dim, width, tiles, fn_dtype
        channels, streams = n * dim, triton.next_power_of_2(n)
        self.rows, self.kept, self.factors = max(16, triton.next_power_of_2(width + 1)), width + 1 + n, n + 1
        self.others, self.scales = (n, 3) if width > n else (0, 1)
        self.sums = triton.next_power_of_2(width + 3)
        self.parts = 1 if tiles is SINGLE else 2
        inner, site = {"N": n, "DIM": dim}, {"CHANNELS": channels, "P": self.rows, "WIDTH": width}
        block = _block(channels, tiles.channels)
        unit = min(tiles.unit, triton.cdiv(channels, block) * block)
        piece = min(tiles.piece, triton.cdiv(channels, unit) * unit)
        pieces, units = triton.cdiv(channels, piece), piece // unit
        self.sums_of = {True: pieces, False: pieces * units}
        self.project = {
            many: _Launch(
                project_kernel,
                {"num_warps": tiles.warps, "num_stages": tiles.stages},
                **site,
                UNIT=unit,
                PIECE=piece if many else unit,
                BLOCK_T=tiles.tokens,
                BLOCK_C=block,
                WIDEN=INTERPRETED,
            )
            for many in (True, False)
        }
        site |= {"N2": streams, "ITERATIONS": iterations}
        self.site_tokens, block = 32 * SITE_WARPS, _block(dim, 2048)
        self.collapse_blocks = triton.cdiv(dim, block)
        self.site = {
            many: _Launch(
                site_kernel,
                {"num_warps": SITE_WARPS},
                PIECES=pieces,
                UNITS=1 if many else units,
                BLOCK_T=self.site_tokens,
                BLOCK_D=block,
                **inner,
                **site,
            )
            for many in (True, False)
        }
        block = _block(dim, 1024)
        self.collapse_backward = _Launch(collapse_backward_kernel, {"num_warps": 4}, N2=streams, BLOCK_D=block, **inner)
        self.back_tokens = 32 * BACK_WARPS
        self.site_backward = _Launch(
            site_backward_kernel,
            {"num_warps": BACK_WARPS},
            BLOCK_T=self.back_tokens,
            SEGMENT=SEGMENT,
            SUMS=self.sums,
            PARTS=self.parts,
            N=n,
            **site,
        )
        block = _block(dim, tiles.back_channels)
        self.streams_programs = n * triton.cdiv(dim, block)
        self.streams_backward = {
            join: _Launch(
                streams_backward_kernel,
                {"num_warps": tiles.back_warps},
                BLOCK_T=tiles.back_tokens,
                BLOCK_D=block,
                WIDTH=width,
                P=self.rows,
                JOIN=join,
                STAGES=tiles.back_stages,
                WIDEN=INTERPRETED,
                **inner,
            )
            for join in (True, False)
        }
        size, used = width * channels, width + self.scales
        self.sums_programs = triton.cdiv(size, 1024) + 1
        self.add = _Launch(sums_kernel, {"num_warps": 4}, SIZE=size, SUMS=self.sums, USED=used, BLOCK=1024, BLOCK_P=64)


_plan = functools.cache(_Plan)


class _Site(torch.autograd.Function):
    """Weights from streams, and the collapse. `rms_norm(x) · fnᵀ` is computed as `(x · fnᵀ) / norm(x)`.

    The streams come out again, so that the gradient by what is done with them there is added where this one is written.
    """

    @staticmethod
    def forward(
        ctx: Any, streams_TND: Tensor, fn_MC: Tensor, base_M: Tensor, scale: Tensor, *constants: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        iterations, eps, norm_eps, tiles = constants
        tokens, n, dim = streams_TND.shape
        plan = _plan(n, dim, base_M.shape[0], iterations, fn_MC.dtype, tiles)
        padded = (tokens + PADDING - 1) // PADDING * PADDING
        device, others = streams_TND.device, plan.others
        mixes_KT = torch.empty(plan.kept, padded, device=device, dtype=torch.float32)
        x_TD = torch.empty(tokens, dim, device=device, dtype=streams_TND.dtype)
        post_TN = torch.empty(tokens, others, device=device, dtype=torch.float32)
        comb_TNN = torch.empty(tokens, others, others, device=device, dtype=torch.float32)
        if tokens:
            wide_MC, *wide = (_aligned(tensor.float()) for tensor in (fn_MC, base_M, scale))
            many = tokens >= MANY_TOKENS
            pieces, sites = plan.sums_of[many], -(-tokens // plan.site_tokens)
            partials_SPT = torch.empty(pieces, plan.rows, padded, device=device, dtype=torch.float32)
            plan.project[many](-(-tokens // tiles.tokens), pieces, streams_TND, wide_MC, partials_SPT, tokens, padded)
            plan.site[many](
                *(sites + tokens * plan.collapse_blocks, 1),
                *(streams_TND, partials_SPT, *wide, mixes_KT, post_TN, comb_TNN, x_TD, tokens, padded, eps, norm_eps),
            )
        if any(ctx.needs_input_grad):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(streams_TND, fn_MC, base_M, scale, mixes_KT)
            ctx.plan, ctx.constants = plan, (eps, norm_eps)
        return x_TD, post_TN, comb_TNN, streams_TND

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        streams_TND, *parameters, mixes_KT = ctx.saved_tensors
        plan = ctx.plan
        tokens, padded, device = len(streams_TND), mixes_KT.shape[1], streams_TND.device
        if not tokens:
            return torch.zeros_like(streams_TND), *map(torch.zeros_like, parameters), None, None, None, None
        by_x, by_post, by_comb, joined = _filled(streams_TND, plan, *gradients)
        wide_MC, *wide = (_aligned(tensor.float()) for tensor in parameters)
        factors = torch.empty(plan.factors, padded, device=device, dtype=torch.float32)
        by_mixes = torch.empty(plan.parts, plan.rows, padded, device=device, dtype=streams_TND.dtype)
        programs = -(-padded // plan.back_tokens)
        sums = torch.empty(programs, plan.sums, device=device, dtype=torch.float32)
        plan.collapse_backward(tokens, 1, streams_TND, by_x, factors, padded)
        plan.site_backward(
            *(programs, 1),
            *(mixes_KT, *wide, factors, by_post, by_comb, by_mixes, sums, tokens, padded, *ctx.constants),
        )
        steps = -(-tokens // plan.tiles.back_tokens)
        group_tokens = -(-steps // min(GROUPS, -(-tokens // GROUP_TOKENS))) * plan.tiles.back_tokens
        groups = -(-tokens // group_tokens)
        by_streams_TND = torch.empty_like(streams_TND)
        by_fn_GMC = torch.empty(groups, *wide_MC.shape, device=device, dtype=torch.float32)
        plan.streams_backward[joined is not None](
            *(plan.streams_programs, groups),
            *(streams_TND, wide_MC, mixes_KT, by_x, by_mixes, factors, streams_TND if joined is None else joined),
            *(by_streams_TND, by_fn_GMC, tokens, padded, group_tokens),
        )
        by_fn_MC = torch.empty(wide_MC.shape, device=device, dtype=plan.fn_dtype)
        by_small = torch.empty(plan.width + plan.scales, device=device, dtype=torch.float32)
        plan.add(plan.sums_programs, 1, by_fn_GMC, sums, by_fn_MC, by_small, groups, programs)
        by_base, by_scale = by_small.split((plan.width, plan.scales))
        small = by_base.to(parameters[1].dtype), by_scale.to(parameters[2].dtype)
        return by_streams_TND, by_fn_MC, *small, None, None, None, None


def _filled(streams_TND: Tensor, plan: _Plan, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients as kernels read them; zeros for a result that nothing was done with, but None for the streams'."""
    tokens, n = len(streams_TND), plan.others
    *three, joined = (None if one is None else _aligned(one) for one in gradients)
    shapes = (tokens, plan.dim), (tokens, n), (tokens, n, n)
    dtypes = streams_TND.dtype, torch.float32, torch.float32
    filled = (
        torch.zeros(shape, device=streams_TND.device, dtype=dtype) if one is None else one
        for one, shape, dtype in zip(three, shapes, dtypes, strict=True)
    )
    return *filled, joined


class _PostPlan:
    """The kernels of `mhc_post`."""

    def __init__(self, n: int, dim: int, dtypes: tuple[torch.dtype, ...], tiles: Tiles) -> None:
        rows, block = max(16, triton.next_power_of_2(n)), _block(dim, 1024)
        self.blocks, self.together = triton.cdiv(dim, block), rows // n
        streams = triton.next_power_of_2(n)
        self.forward = _Launch(post_kernel, {"num_warps": 4}, N=n, N2=streams, DIM=dim, BLOCK_D=block)
        self.backward = _Launch(
            post_backward_kernel,
            {"num_warps": tiles.post_warps, "num_stages": 3},
            N=n,
            DIM=dim,
            ROWS=rows,
            BLOCK_D=_block(dim, tiles.post_channels),
            WIDEN=INTERPRETED,
        )


_post_plan = functools.cache(_PostPlan)


class _Post(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, streams_TND: Tensor, out_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor, tiles: Tiles
    ) -> Tensor:
        tokens, n, dim = streams_TND.shape
        plan = _post_plan(n, dim, (post_TN.dtype, comb_TNN.dtype), tiles)
        mixed_TND = torch.empty_like(streams_TND)
        if tokens:
            plan.forward(tokens, plan.blocks, streams_TND, out_TD, post_TN, comb_TNN, mixed_TND)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(streams_TND, out_TD, post_TN, comb_TNN)
            ctx.plan = plan
        return mixed_TND

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        results = tuple(torch.empty_like(tensor) for tensor in inputs)
        if tokens := inputs[0].shape[0]:
            programs = -(-tokens // ctx.plan.together)
            ctx.plan.backward(programs, 1, *inputs, _aligned(gradients[0]), *results, tokens)
        return *results, None


def mhc_site(
    op: str, streams_TND: Tensor, fn_MC: Tensor, base_M: Tensor, scale: Tensor, iterations: int, *constants: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the op. Streams are fp32 or bf16; x has their dtype.

    Args:
        op: what errors are to name.
        constants: eps, norm_eps.

    Raises:
        ValueError: another dtype, or tensors on several devices.
    """
    tiles = _kind(op, streams=streams_TND)
    _same_device(op, streams_TND, fn=fn_MC, base=base_M, scale=scale)
    inputs = _aligned(streams_TND), fn_MC, base_M, scale
    x_TD, post_TN, comb_TNN, streams_TND = differentiable(_Site, *inputs, iterations, *constants, tiles)
    return x_TD, post_TN, comb_TNN, streams_TND


def mhc_post(streams_TND: Tensor, out_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """See the op. Streams and out are both fp32 or both bf16.

    Raises:
        ValueError: other dtypes, or tensors on several devices.
    """
    tiles = _kind("mhc_post", streams=streams_TND, out=out_TD)
    _same_device("mhc_post", streams_TND, out=out_TD, post=post_TN, comb=comb_TNN)
    inputs = (_aligned(tensor) for tensor in (streams_TND, out_TD, post_TN, comb_TNN))
    mixed_TND: Tensor = differentiable(_Post, *inputs, tiles)
    return mixed_TND
