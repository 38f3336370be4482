"""The mHC operations on the GPU: launches and gradients. docs/kernels/mhc.md counts what they read and write.

A site goes in three steps: `project` reads all streams once, for projections and norm at the same time, in fixed
pieces of the channels; `site` adds the pieces up and turns them into weights, Sinkhorn included; `collapse` reads the
streams again. Which tiles run depends on shapes of features and on the dtype alone, so that neither the number of
tokens nor a gradient changes a bit of a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from posttrain.kernels.compiled import differentiable
from posttrain.kernels.mhc.triton_site import site_backward_kernel, site_kernel
from posttrain.kernels.mhc.triton_streams import (
    collapse_backward_kernel,
    collapse_kernel,
    post_backward_kernel,
    post_kernel,
    project_kernel,
    streams_backward_kernel,
)

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The interpreter multiplies bf16 as if its bits were integers; there, operands are widened first."""

PADDING = 64
"""Buffers with tokens last have room for a multiple of this many: whole tiles, and one compiled variant."""

PIECE = 2048
"""Channels whose projections are summed by one program."""

GROUP_TOKENS, GROUPS = 2048, 8
"""The gradient by fn is summed by groups of at least so many tokens, up to so many groups at once."""

SITE_TOKENS = 32
"""Tokens of a one-warp program: one in each lane."""

SEGMENT = 5
"""Sinkhorn iterations between two matrices that the backward computes from the start: about the root of V4's 20."""


@dataclass(frozen=True)
class Tiles:
    """Sizes of tiles that tensor cores multiply, for one dtype of the streams."""

    tokens: int
    channels: int
    back_tokens: int
    back_channels: int
    post_channels: int


NARROW = Tiles(tokens=64, channels=64, back_tokens=64, back_channels=64, post_channels=256)
SINGLE = Tiles(tokens=32, channels=32, back_tokens=16, back_channels=64, post_channels=64)


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
    """Without gaps, and begun where the widest loads may begin: how wide they are decides who sums which squares."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@dataclass(frozen=True)
class _Shape:
    """Sizes of a site, and what its kernels are told of them."""

    tokens: int
    n: int
    dim: int
    width: int

    @property
    def channels(self) -> int:
        return self.n * self.dim

    @property
    def padded(self) -> int:
        return triton.cdiv(self.tokens, PADDING) * PADDING

    @property
    def rows(self) -> int:
        """Rows of a buffer of mixes: the projections, the sum of squares, and up to what a tensor core multiplies."""
        return max(16, triton.next_power_of_2(self.width + 1))

    @property
    def streams(self) -> int:
        return triton.next_power_of_2(self.n)

    @property
    def pieces(self) -> int:
        return triton.cdiv(self.channels, PIECE)

    def buffer(self, like: Tensor, *rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Not initialised; tokens last."""
        return torch.empty(*rows, self.padded, dtype=dtype, device=like.device)

    def site(self) -> dict[str, int]:
        """What both kernels of the small part are compiled for."""
        sizes = {"CHANNELS": self.channels, "WIDTH": self.width, "P": self.rows, "N": self.n, "N2": self.streams}
        return sizes | {"BLOCK_T": SITE_TOKENS, "num_warps": 1}


def _block(dim: int, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(dim)))


class _Site(torch.autograd.Function):
    """Weights from streams, and the collapse. `rms_norm(x) · fnᵀ` is computed as `(x · fnᵀ) / norm(x)`."""

    @staticmethod
    def forward(
        ctx: Any, streams_TND: Tensor, fn_MC: Tensor, base_M: Tensor, scale: Tensor, *constants: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        iterations, eps, norm_eps, tiles = constants
        tokens, n, dim = streams_TND.shape
        shape = _Shape(tokens, n, dim, len(base_M))
        wide = [tensor.float().contiguous() for tensor in (fn_MC, base_M, scale)]
        mixes_PT, pre_NT = shape.buffer(streams_TND, shape.rows), shape.buffer(streams_TND, n)
        x_TD = streams_TND.new_empty(tokens, dim)
        others = n if shape.width > n else 0
        post_TN = x_TD.new_empty(tokens, others, dtype=torch.float32)
        comb_TNN = x_TD.new_empty(tokens, others, others, dtype=torch.float32)
        if tokens:
            partials_SPT = shape.buffer(streams_TND, shape.pieces, shape.rows)
            block = _block(shape.channels, tiles.channels)
            project_kernel[triton.cdiv(tokens, tiles.tokens), shape.pieces](
                *(streams_TND, wide[0], partials_SPT, tokens, shape.padded),
                CHANNELS=shape.channels,
                PIECE=min(PIECE, triton.cdiv(shape.channels, block) * block),
                WIDTH=shape.width,
                P=shape.rows,
                BLOCK_T=tiles.tokens,
                BLOCK_C=block,
                WIDEN=INTERPRETED,
                num_warps=4,
                num_stages=4,
            )
            site_kernel[(shape.padded // SITE_TOKENS,)](
                *(partials_SPT, *wide[1:], mixes_PT, pre_NT, post_TN, comb_TNN, tokens, shape.padded, eps, norm_eps),
                **shape.site(),
                PIECES=shape.pieces,
                ITERATIONS=iterations,
            )
            block = _block(dim, 2048)
            collapse_kernel[tokens, triton.cdiv(dim, block)](
                *(streams_TND, pre_NT, x_TD, tokens, shape.padded),
                N=n,
                DIM=dim,
                BLOCK_D=block,
                num_warps=4,
            )
        ctx.save_for_backward(streams_TND, fn_MC, base_M, scale, mixes_PT, pre_NT)
        ctx.shape, ctx.constants = shape, constants
        return x_TD, post_TN, comb_TNN

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        streams_TND, fn_MC, base_M, scale, mixes_PT, pre_NT = ctx.saved_tensors
        shape, (iterations, eps, norm_eps, tiles) = ctx.shape, ctx.constants
        parameters = fn_MC, base_M, scale
        if not shape.tokens:
            return torch.zeros_like(streams_TND), *map(torch.zeros_like, parameters), None, None, None, None
        wide = [tensor.float().contiguous() for tensor in parameters]
        by_x, by_post, by_comb = (gradient.contiguous() for gradient in gradients)
        by_pre_NT = torch.empty_like(pre_NT)
        block = _block(shape.dim, 1024)
        collapse_backward_kernel[(shape.tokens,)](
            *(streams_TND, by_x, by_pre_NT, shape.padded),
            N=shape.n,
            N2=shape.streams,
            DIM=shape.dim,
            BLOCK_D=block,
            num_warps=4,
        )
        programs = shape.padded // SITE_TOKENS
        parts = 1 if streams_TND.dtype is torch.float32 else 2
        by_mixes = shape.buffer(streams_TND, parts, shape.rows, dtype=streams_TND.dtype)
        factor_T = shape.buffer(streams_TND)
        base_sums = by_x.new_zeros(programs, shape.rows, dtype=torch.float32)
        scale_sums = base_sums.new_zeros(programs, 4)
        site_backward_kernel[(programs,)](
            *(mixes_PT, *wide[1:], by_pre_NT, by_post, by_comb, by_mixes, factor_T, base_sums, scale_sums),
            *(shape.tokens, shape.padded, eps, norm_eps),
            **shape.site(),
            ITERATIONS=iterations,
            SEGMENT=SEGMENT,
            PARTS=parts,
        )
        inputs = streams_TND, wide[0], pre_NT, by_x, by_mixes, factor_T
        by_streams_TND, by_fn_GMC = _streams_backward(shape, tiles, *inputs)
        sums = by_fn_GMC.sum(0), base_sums.sum(0)[: shape.width], scale_sums.sum(0)[: len(scale)]
        by_parameters = (found.to(tensor.dtype) for found, tensor in zip(sums, parameters, strict=True))
        return by_streams_TND, *by_parameters, None, None, None, None


def _streams_backward(
    shape: _Shape, tiles: Tiles, streams_TND: Tensor, fn_MC: Tensor, *factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient by the streams, and by fn for each group of tokens, to be summed in their order."""
    by_streams_TND = torch.empty_like(streams_TND)
    steps = triton.cdiv(shape.tokens, tiles.back_tokens)
    group_tokens = triton.cdiv(steps, min(GROUPS, triton.cdiv(shape.tokens, GROUP_TOKENS))) * tiles.back_tokens
    groups, block = triton.cdiv(shape.tokens, group_tokens), _block(shape.dim, tiles.back_channels)
    by_fn_GMC = fn_MC.new_empty(groups, *fn_MC.shape)
    streams_backward_kernel[shape.n * triton.cdiv(shape.dim, block), groups](
        *(streams_TND, fn_MC, *factors, by_streams_TND, by_fn_GMC, shape.tokens, shape.padded, group_tokens),
        N=shape.n,
        DIM=shape.dim,
        WIDTH=shape.width,
        P=shape.rows,
        BLOCK_T=tiles.back_tokens,
        BLOCK_D=block,
        WIDEN=INTERPRETED,
        num_warps=4,
        num_stages=3,
    )
    return by_streams_TND, by_fn_GMC


class _Post(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, tiles = inputs
        streams_TND = tensors[0]
        tokens, n, dim = streams_TND.shape
        mixed_TND = torch.empty_like(streams_TND)
        if tokens:
            block = _block(dim, 1024)
            post_kernel[tokens, triton.cdiv(dim, block)](
                *tensors,
                mixed_TND,
                N=n,
                N2=triton.next_power_of_2(n),
                DIM=dim,
                BLOCK_D=block,
                num_warps=4,
            )
        ctx.save_for_backward(*tensors)
        ctx.tiles = tiles
        return mixed_TND

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        tokens, n, dim = inputs[0].shape
        results = tuple(torch.empty_like(tensor) for tensor in inputs)
        if tokens:
            rows = max(16, triton.next_power_of_2(n))
            post_backward_kernel[(triton.cdiv(tokens, rows // n),)](
                *(*inputs, gradients[0].contiguous(), *results, tokens),
                N=n,
                DIM=dim,
                ROWS=rows,
                BLOCK_D=_block(dim, ctx.tiles.post_channels),
                WIDEN=INTERPRETED,
                num_warps=4,
                num_stages=3,
            )
        return *results, None


def mhc_pre(
    streams_TND: Tensor, fn_MC: Tensor, base_M: Tensor, scale_3: Tensor, *, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See the op. Streams are fp32 or bf16; x has their dtype.

    Raises:
        ValueError: another dtype, or tensors on several devices.
    """
    tiles = _kind("mhc_pre", streams=streams_TND)
    _same_device("mhc_pre", streams_TND, fn=fn_MC, base=base_M, scale=scale_3)
    inputs = _aligned(streams_TND), fn_MC, base_M, scale_3
    x_TD, post_TN, comb_TNN = differentiable(_Site, *inputs, iterations, eps, norm_eps, tiles)
    return x_TD, post_TN, comb_TNN


def mhc_post(streams_TND: Tensor, out_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """See the op. Streams and out are both fp32 or both bf16.

    Raises:
        ValueError: other dtypes, or tensors on several devices.
    """
    tiles = _kind("mhc_post", streams=streams_TND, out=out_TD)
    _same_device("mhc_post", streams_TND, out=out_TD, post=post_TN, comb=comb_TNN)
    inputs = (tensor.contiguous() for tensor in (streams_TND, out_TD, post_TN, comb_TNN))
    mixed_TND: Tensor = differentiable(_Post, *inputs, tiles)
    return mixed_TND


def mhc_head(
    streams_TND: Tensor, fn_NC: Tensor, base_N: Tensor, scale_1: Tensor, *, eps: float, norm_eps: float
) -> Tensor:
    """See the op. Streams are fp32 or bf16; the result has their dtype.

    Raises:
        ValueError: another dtype, or tensors on several devices.
    """
    tiles = _kind("mhc_head", streams=streams_TND)
    _same_device("mhc_head", streams_TND, fn=fn_NC, base=base_N, scale=scale_1)
    inputs = _aligned(streams_TND), fn_NC, base_N, scale_1
    x_TD: Tensor = differentiable(_Site, *inputs, 1, eps, norm_eps, tiles)[0]
    return x_TD
