"""Triton: what lies between the divergence's large matrix products, which are the vendor's (`tiles.product`).

A tile of logits is read twice: by `_statistics_kernel` for the softmax sums of every token, and by `_gradient_kernel`;
once more in between for a mixture. Every sum has a fixed order: lane by lane, then a tree, then a tree over spans.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.vocabulary.form import Form, Summary

FLOOR = tl.constexpr(-1e30)
"""Below every logit: what lanes beyond the vocabulary hold, and the maximum of none. Finite, so that 0 · FLOOR is 0."""

FIELDS = tl.constexpr(5)
"""Of a model's running softmax: maximum, mass, spread, tilt (see `_fold`) and the place of the maximum."""

NOWHERE = tl.constexpr(2**30)

SPAN, BLOCK, WARPS = 16384, 1024, 8
"""Entries of the vocabulary that a program sums up, how many at a time, with how many warps: 4 entries a thread."""

GRADIENT_BLOCK = 2048


@triton.jit
def _fold(x, gap, columns, highest, mass, spread, tilt, best):
    """One more logit into each lane's running softmax, relative to the lane's maximum m:

    mass = sum e^(x - m),   spread = sum e^(x - m) (x - m),   tilt = sum e^(x - m) gap
    """
    step = x - highest
    larger = step > 0
    smaller_share = tl.exp(-tl.abs(step))  # of the two terms the smaller, relative to the larger
    rescale = tl.where(larger, smaller_share, 1.0)
    share = tl.where(larger, 1.0, smaller_share)
    spread = rescale * (spread - mass * tl.maximum(step, 0.0)) + share * tl.minimum(step, 0.0)
    mass = rescale * mass + share
    tilt = rescale * tilt + share * gap
    best = tl.where(larger, columns, best)
    return tl.maximum(highest, x), mass, spread, tilt, best


@triton.jit
def _merge(highest, mass, spread, tilt, best):
    """All lanes in one: a tree of fixed shape. The place is the lowest of those that hold the maximum."""
    top = tl.max(highest, axis=0)
    rescale = tl.exp(highest - top)
    total_spread = tl.sum(rescale * (spread + mass * (highest - top)), axis=0)
    place = tl.min(tl.where(highest == top, best, NOWHERE), axis=0)
    return top, tl.sum(rescale * mass, axis=0), total_spread, tl.sum(rescale * tilt, axis=0), place


@triton.jit
def _put_partial(partial, field_stride, at, top, mass, spread, tilt, place):
    tl.store(partial + at, top)
    tl.store(partial + field_stride + at, mass)
    tl.store(partial + 2 * field_stride + at, spread)
    tl.store(partial + 3 * field_stride + at, tilt)
    tl.store(partial + 4 * field_stride + at, place.to(tl.float32))  # exact: a vocabulary is smaller than 2^24


@triton.jit
def _get_partial(partial, field_stride, at, mask):
    """The partial sums of a token as lanes, merged."""
    highest = tl.load(partial + at, mask=mask, other=FLOOR)
    mass = tl.load(partial + field_stride + at, mask=mask, other=0.0)
    spread = tl.load(partial + 2 * field_stride + at, mask=mask, other=0.0)
    tilt = tl.load(partial + 3 * field_stride + at, mask=mask, other=0.0)
    best = tl.load(partial + 4 * field_stride + at, mask=mask, other=0.0).to(tl.int32)
    return _merge(highest, mass, spread, tilt, best)


@triton.jit
def _statistics_kernel(
    student,
    teacher,
    row_stride,
    partial,
    rows,
    vocabulary,
    spans,
    inverse_temperature,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, span): the softmax sums of both models over a span, to `partial[2 · FIELDS, rows, spans]`."""
    row = tl.program_id(0).to(tl.int64)
    span = tl.program_id(1)
    student_row, teacher_row = student + row * row_stride, teacher + row * row_stride
    lanes = tl.arange(0, BLOCK)
    nothing = tl.zeros((BLOCK,), tl.float32)
    nowhere = tl.zeros((BLOCK,), tl.int32)
    highest, mass, spread, tilt, best = nothing + FLOOR, nothing, nothing, nothing, nowhere
    highest_t, mass_t, spread_t, tilt_t, best_t = nothing + FLOOR, nothing, nothing, nothing, nowhere
    for start in range(0, SPAN, BLOCK):
        columns = span * SPAN + start + lanes
        mask = columns < vocabulary
        z = tl.where(mask, tl.load(student_row + columns, mask=mask, other=0.0) * inverse_temperature, FLOOR)
        u = tl.where(mask, tl.load(teacher_row + columns, mask=mask, other=0.0) * inverse_temperature, FLOOR)
        highest, mass, spread, tilt, best = _fold(z, z - u, columns, highest, mass, spread, tilt, best)
        highest_t, mass_t, spread_t, tilt_t, best_t = _fold(
            u, u - z, columns, highest_t, mass_t, spread_t, tilt_t, best_t
        )
    field_stride = rows * spans
    at = row * spans + span
    top, mass_1, spread_1, tilt_1, place = _merge(highest, mass, spread, tilt, best)
    _put_partial(partial, field_stride, at, top, mass_1, spread_1, tilt_1, place)
    top, mass_1, spread_1, tilt_1, place = _merge(highest_t, mass_t, spread_t, tilt_t, best_t)
    _put_partial(partial + FIELDS * field_stride, field_stride, at, top, mass_1, spread_1, tilt_1, place)


@triton.jit
def _summary_kernel(
    partial,
    rows,
    spans,
    summary,
    summary_stride,
    REVERSE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    STUDENT_ENTROPY: tl.constexpr,
    TEACHER_ENTROPY: tl.constexpr,
    SAME_TOP: tl.constexpr,
    ANCHOR: tl.constexpr,
    STUDENT_LOG_MASS: tl.constexpr,
    TEACHER_LOG_MASS: tl.constexpr,
    LANES: tl.constexpr,
):
    """A token's spans together: all of its summary, with the reverse or the forward KL as divergence."""
    row = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    mask = lanes < spans
    field_stride = rows * spans
    at = row * spans + lanes
    top, mass, spread, tilt, place = _get_partial(partial, field_stride, at, mask)
    top_t, mass_t, spread_t, tilt_t, place_t = _get_partial(partial + FIELDS * field_stride, field_stride, at, mask)
    log_mass, log_mass_t = top + tl.log(mass), top_t + tl.log(mass_t)
    if REVERSE:
        divergence = tilt / mass - (log_mass - log_mass_t)
    else:
        divergence = tilt_t / mass_t - (log_mass_t - log_mass)
    out = summary + row
    tl.store(out + DIVERGENCE * summary_stride, divergence)
    tl.store(out + ANCHOR * summary_stride, divergence)
    tl.store(out + STUDENT_ENTROPY * summary_stride, tl.log(mass) - spread / mass)
    tl.store(out + TEACHER_ENTROPY * summary_stride, tl.log(mass_t) - spread_t / mass_t)
    tl.store(out + SAME_TOP * summary_stride, (place == place_t).to(tl.float32))
    tl.store(out + STUDENT_LOG_MASS * summary_stride, log_mass)
    tl.store(out + TEACHER_LOG_MASS * summary_stride, log_mass_t)


@triton.jit
def _log_mixture(log_p, log_q, log_student_share, log_teacher_share):
    a = log_p + log_student_share
    b = log_q + log_teacher_share
    return tl.maximum(a, b) + tl.log(1.0 + tl.exp(-tl.abs(a - b)))


@triton.jit
def _mixture_kernel(
    student,
    teacher,
    row_stride,
    student_log_mass,
    teacher_log_mass,
    partial,
    rows,
    vocabulary,
    spans,
    inverse_temperature,
    log_student_share,
    log_teacher_share,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, span): KL(p ‖ m) and KL(q ‖ m) over a span, to `partial[2, rows, spans]`."""
    row = tl.program_id(0).to(tl.int64)
    span = tl.program_id(1)
    student_row, teacher_row = student + row * row_stride, teacher + row * row_stride
    log_mass, log_mass_t = tl.load(student_log_mass + row), tl.load(teacher_log_mass + row)
    lanes = tl.arange(0, BLOCK)
    of_student = tl.zeros((BLOCK,), tl.float32)
    of_teacher = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, SPAN, BLOCK):
        columns = span * SPAN + start + lanes
        mask = columns < vocabulary
        log_p = tl.load(student_row + columns, mask=mask, other=0.0) * inverse_temperature - log_mass
        log_q = tl.load(teacher_row + columns, mask=mask, other=0.0) * inverse_temperature - log_mass_t
        log_m = _log_mixture(log_p, log_q, log_student_share, log_teacher_share)
        of_student += tl.where(mask, tl.exp(log_p) * (log_p - log_m), 0.0)
        of_teacher += tl.where(mask, tl.exp(log_q) * (log_q - log_m), 0.0)
    at = row * spans + span
    tl.store(partial + at, tl.sum(of_student, axis=0))
    tl.store(partial + rows * spans + at, tl.sum(of_teacher, axis=0))


@triton.jit
def _gradient_kernel(
    student,
    teacher,
    row_stride,
    student_log_mass,
    teacher_log_mass,
    anchors,
    weights,
    out,
    out_stride,
    vocabulary,
    inverse_temperature,
    slope,
    log_student_share,
    log_teacher_share,
    FORWARD: tl.constexpr,
    MIXTURE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, block): `out = d divergence / d logits · slope · weight`, rounded to the type of `out`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < vocabulary
    z = tl.load(student + row * row_stride + columns, mask=mask, other=0.0)
    u = tl.load(teacher + row * row_stride + columns, mask=mask, other=0.0)
    log_p = z * inverse_temperature - tl.load(student_log_mass + row)
    log_q = u * inverse_temperature - tl.load(teacher_log_mass + row)
    p = tl.exp(log_p)
    if FORWARD:
        gradient = p - tl.exp(log_q)
    elif MIXTURE:
        log_m = _log_mixture(log_p, log_q, log_student_share, log_teacher_share)
        gradient = p * (log_p - log_m - tl.load(anchors + row))
    else:
        gradient = p * (log_p - log_q - tl.load(anchors + row))
    factor = slope
    if WEIGHTED:
        factor = slope * tl.load(weights + row)
    tl.store(out + row * out_stride + columns, (gradient * factor).to(out.dtype.element_ty), mask=mask)


def statistics(student_NV: Tensor, teacher_NV: Tensor, form: Form, summary_FN: Tensor) -> tuple[Tensor, Tensor]:
    """Fill the summary of a tile's tokens from fp32 logits of equal strides; returns the logits."""
    rows, vocabulary = student_NV.shape
    span = min(SPAN, triton.cdiv(vocabulary, BLOCK) * BLOCK)
    spans = triton.cdiv(vocabulary, span)
    partial = student_NV.new_empty(2 * FIELDS.value, rows, spans)
    tile = student_NV, teacher_NV, student_NV.stride(0)
    grid = rows, spans
    _statistics_kernel[grid](
        *tile, partial, rows, vocabulary, spans, form.inverse_temperature, SPAN=span, BLOCK=BLOCK, num_warps=WARPS
    )
    _summary_kernel[(rows,)](
        *(partial, rows, spans, summary_FN, summary_FN.stride(0)),
        REVERSE=form.beta == 1,
        DIVERGENCE=Summary.DIVERGENCE,
        STUDENT_ENTROPY=Summary.STUDENT_ENTROPY,
        TEACHER_ENTROPY=Summary.TEACHER_ENTROPY,
        SAME_TOP=Summary.SAME_TOP,
        ANCHOR=Summary.ANCHOR,
        STUDENT_LOG_MASS=Summary.STUDENT_LOG_MASS,
        TEACHER_LOG_MASS=Summary.TEACHER_LOG_MASS,
        LANES=triton.next_power_of_2(spans),
        num_warps=1,
    )
    if form.is_mixture:
        masses = summary_FN[Summary.STUDENT_LOG_MASS], summary_FN[Summary.TEACHER_LOG_MASS]
        _mixture_kernel[grid](
            *(*tile, *masses, partial, rows, vocabulary, spans, form.inverse_temperature, *form.log_shares),
            SPAN=span,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        of_student_N, of_teacher_N = partial[:2].sum(-1)
        summary_FN[Summary.ANCHOR] = of_student_N
        summary_FN[Summary.DIVERGENCE] = (1 - form.beta) * of_student_N + form.beta * of_teacher_N
    return student_NV, teacher_NV


def gradient(
    state: tuple[Tensor, Tensor], form: Form, summary_FN: Tensor, weights_N: Tensor | None, out_NV: Tensor
) -> None:
    """Write each token's row of the gradient in the student's logits, times its weight."""
    student_NV, teacher_NV = state
    rows, vocabulary = student_NV.shape
    anchor_N = summary_FN[Summary.ANCHOR]
    _gradient_kernel[(rows, triton.cdiv(vocabulary, GRADIENT_BLOCK))](
        *(student_NV, teacher_NV, student_NV.stride(0)),
        *(summary_FN[Summary.STUDENT_LOG_MASS], summary_FN[Summary.TEACHER_LOG_MASS], anchor_N),
        *(anchor_N if weights_N is None else weights_N, out_NV, out_NV.stride(0)),
        *(vocabulary, form.inverse_temperature, form.slope, *form.log_shares),
        FORWARD=form.beta == 0,
        MIXTURE=form.is_mixture,
        WEIGHTED=weights_N is not None,
        BLOCK=GRADIENT_BLOCK,
        num_warps=WARPS,
    )
