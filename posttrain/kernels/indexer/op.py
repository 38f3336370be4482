"""The lightning indexer: which compressed entries a query attends to (V4 report eqs. 13-17), and how it learns."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from posttrain.kernels.backend import backend_of
from posttrain.kernels.blocks import BLOCK
from posttrain.kernels.checks import expect
from posttrain.kernels.compiled import Kernels, dense, differentiable, float_rows, has_kernels, run
from posttrain.kernels.indexer import oracle
from posttrain.kernels.indexer.candidates import Candidates

cpu, triton = Kernels(__package__), Kernels(__package__, "triton")
quant = Kernels("posttrain.kernels.quant", "op")

IndexPrecision = Literal["fp4"]

BUFFER = 2**24
"""Scores that `index_topk` holds at once where it has no kernel of its own: 64 MiB of fp32."""


class _IndexScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, weights_TH: Tensor, keys_SD: Tensor, candidates_TE: Tensor) -> Tensor:
        out_TE = q_THD.new_empty(candidates_TE.shape)
        keys = keys_SD.data_ptr(), keys_SD.stride(0), len(keys_SD)
        run(cpu.forward, q_THD, weights_TH, *q_THD.shape, *keys, candidates_TE, candidates_TE.shape[1], out_TE)
        ctx.save_for_backward(q_THD, weights_TH, keys_SD, candidates_TE)
        return out_TE

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_THD, weights_TH, keys_SD, candidates_TE = ctx.saved_tensors
        dq_THD, dweights_TH = torch.zeros_like(q_THD), torch.zeros_like(weights_TH)
        dkeys_SD = keys_SD.new_zeros(keys_SD.shape)
        keys, results = (keys_SD.data_ptr(), keys_SD.stride(0)), (dq_THD, dweights_TH, dkeys_SD)
        candidates = candidates_TE, candidates_TE.shape[1]
        run(cpu.backward, q_THD, weights_TH, *q_THD.shape, *keys, *candidates, gradients[0].contiguous(), *results)
        return dq_THD, dweights_TH, dkeys_SD, None


def index_scores(
    q_THD: Tensor,
    weights_TH: Tensor,
    keys_SD: Tensor,
    candidates: Tensor | Candidates,
    precision: IndexPrecision | None = None,
) -> Tensor:
    """`I[t, e] = sum_h w[t, h] · relu(q[t, h] · key[candidate(t, e)])` in fp32.

    Args:
        q_THD: rotated indexer queries.
        weights_TH: head weights, already scaled by `D**-0.5 · H**-0.5`.
        keys_SD: the store of compressed indexer keys; read in the queries' dtype.
        candidates: int64 rows `[T, E]` of `keys_SD`, -1 where there is none (a few for each token), or `Candidates`
            (all entries of its sequence that are complete; for a gradient, no row may be two sequences').
        precision: "fp4" rounds queries and keys to MXFP4; gradients pass straight through.

    Returns:
        `[T, E]` fp32, -inf where there is no candidate. Gradients go to queries, weights and keys.

    Raises:
        ValueError: names the argument whose shape or value does not fit.
    """
    _check("index_scores", q_THD, weights_TH, keys_SD, candidates)
    q_THD, keys_SD = _rounded("index_scores", q_THD, keys_SD, precision)
    if backend_of(q_THD) == "triton":
        return triton.index_scores(q_THD, weights_TH, keys_SD, candidates)
    rows_TE = candidates.rows_TE if isinstance(candidates, Candidates) else candidates
    if has_kernels(q_THD):
        inputs = dense(q_THD), dense(weights_TH), float_rows(keys_SD), rows_TE.long().contiguous()
        return differentiable(_IndexScores, *inputs)
    return oracle.index_scores(q_THD, weights_TH, keys_SD, rows_TE)


@torch.no_grad()
def index_topk(
    q_THD: Tensor,
    weights_TH: Tensor,
    keys_SD: Tensor,
    candidates: Candidates,
    k: int,
    precision: IndexPrecision | None = None,
) -> Tensor:
    """The `k` candidates of each token with the highest `index_scores`; never holds the scores of all tokens.

    Arguments as in `index_scores`.

    Returns:
        int64 entry numbers `[T, k]`, *rising*, then -1 where there are fewer than `k`; of equal scores, the lowest
        entries. (`Candidates.rows_of` turns them into rows of a store.) No gradient passes a choice.

    Raises:
        ValueError: names the argument whose shape or value does not fit.
    """
    _check("index_topk", q_THD, weights_TH, keys_SD, candidates)
    if k < 1:
        raise ValueError(f"index_topk: k is {k}; expected at least 1")
    q_THD, keys_SD = _rounded("index_topk", q_THD, keys_SD, precision)
    if candidates.columns <= k:
        return candidates.first(k)
    if backend_of(q_THD) == "triton":
        return triton.index_topk(q_THD, weights_TH, keys_SD, candidates, k)
    if has_kernels(q_THD):
        return _choose_compiled(dense(q_THD), dense(weights_TH), float_rows(keys_SD), candidates, k)
    tokens = len(q_THD)
    step = max(1, BUFFER // candidates.columns)
    parts = [
        _choose(q_THD[first:stop], weights_TH[first:stop], keys_SD, candidates.of_tokens(first, stop), k)
        for first, stop in ((first, min(first + step, tokens)) for first in range(0, max(tokens, 1), step))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _choose_compiled(q_THD: Tensor, weights_TH: Tensor, keys_SD: Tensor, candidates: Candidates, k: int) -> Tensor:
    """`index_topk` by the CPU's kernel, which needs no row numbers."""
    chosen_TK = candidates.count_T.new_empty(len(q_THD), k)
    keys = keys_SD.data_ptr(), keys_SD.stride(0), len(keys_SD)
    own = candidates.count_T.contiguous(), candidates.sequence_T.contiguous(), candidates.pages_RP.contiguous()
    pages = candidates.pages_RP.shape[1], candidates.page_size
    run(cpu.choose, q_THD, weights_TH, *q_THD.shape, *keys, *own, *pages, k, chosen_TK)
    return chosen_TK


def _choose(q_THD: Tensor, weights_TH: Tensor, keys_SD: Tensor, candidates: Candidates, k: int) -> Tensor:
    """`index_topk` of some tokens, by their scores."""
    chosen_TK = topk_stable(index_scores(q_THD, weights_TH, keys_SD, candidates), k)
    missing_TK = chosen_TK >= candidates.count_T.unsqueeze(1)
    chosen_TK = chosen_TK.masked_fill(missing_TK, candidates.columns).sort(1).values
    return chosen_TK.masked_fill(chosen_TK == candidates.columns, -1)


def topk_stable(scores: Tensor, k: int) -> Tensor:
    """Indices `[..., k]` of the `k` largest values, in descending order; ties go to the lowest index, NaN first."""
    if backend_of(scores) == "triton":
        return triton.topk_stable(scores, k)
    return oracle.topk_stable(scores, k)


def index_divergence(scores_TE: Tensor, target_TE: Tensor) -> Tensor:
    """`KL(p[t] || softmax(scores[t]))` over each token's candidates: what V3.2 and V4 train the indexer with.

    `p = target / sum(target)`; the target is the attention that the token pays to each candidate, summed over heads.
    The candidates are all complete entries while attention is dense, and the chosen ones once it is sparse.

    Args:
        scores_TE: index scores; an entry whose score is -inf does not exist and takes no part.
        target_TE: not negative; need not be normalised. A token whose targets are all 0 has divergence 0.

    Returns:
        `[T]` fp32. The gradient goes to the scores only.

    Raises:
        ValueError: the shapes differ.
    """
    tokens, columns = expect("index_divergence", "scores", scores_TE, "T", "E")
    expect("index_divergence", "target", target_TE, tokens, columns)
    if backend_of(scores_TE) == "triton":
        return triton.index_divergence(scores_TE, target_TE)
    return oracle.index_divergence(scores_TE, target_TE)


def _check(op: str, q_THD: Tensor, weights_TH: Tensor, keys_SD: Tensor, candidates: Tensor | Candidates) -> None:
    tokens, heads, dim = expect(op, "q", q_THD, "T", "H", "D")
    expect(op, "weights", weights_TH, tokens, heads)
    expect(op, "keys", keys_SD, "S", dim)
    if isinstance(candidates, Candidates):
        numbers = {"count": candidates.count_T, "sequence": candidates.sequence_T, "pages": candidates.pages_RP}
        expect(op, "count of candidates", candidates.count_T, tokens)
        expect(op, "sequence of candidates", candidates.sequence_T, tokens)
        expect(op, "pages of candidates", candidates.pages_RP, "R", "P")
        if candidates.columns % BLOCK or candidates.page_size < 1:
            raise ValueError(
                f"{op}: candidates have {candidates.columns} columns and pages of {candidates.page_size}; "
                f"expected a multiple of {BLOCK}, and at least 1"
            )
    else:
        numbers = {"candidates": candidates}
        expect(op, "candidates", candidates, tokens, "E")
    for name, tensor in {"weights": weights_TH, "keys": keys_SD, **numbers}.items():
        if tensor.device != q_THD.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; expected {q_THD.device}, as q")
        if name in numbers and tensor.dtype is not torch.int64:
            raise ValueError(f"{op}: {name} is {tensor.dtype}; expected torch.int64")


def _rounded(op: str, q_THD: Tensor, keys_SD: Tensor, precision: IndexPrecision | None) -> tuple[Tensor, Tensor]:
    """Queries and keys as the precision has them; rounding again what is rounded already changes nothing."""
    if precision is None:
        return q_THD, keys_SD
    if precision not in get_args(IndexPrecision):
        raise ValueError(f"{op}: precision is {precision!r}; expected None or one of {get_args(IndexPrecision)}")
    return quant.fake_quantize_mxfp4(q_THD), quant.fake_quantize_mxfp4(keys_SD)
