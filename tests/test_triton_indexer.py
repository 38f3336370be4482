"""The indexer's Triton kernels: against fp64, bit by bit against themselves, and the choice against a plain sort."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain import kernels
from posttrain.kernels import Candidates
from posttrain.kernels.blocks import round_up
from posttrain.kernels.indexer import oracle, triton_divergence, triton_topk
from posttrain.kernels.indexer import triton as indexer
from posttrain.kernels.quant.op import fake_quantize_mxfp4
from tests.triton_kit import DEVICE, assert_agrees, normal, running

DTYPES = [torch.float32, torch.bfloat16]
seeds = st.integers(0, 2**31)
examples = settings(max_examples=8, deadline=None, derandomize=True)
few = settings(max_examples=6, deadline=None, derandomize=True)
Inputs = tuple[Tensor, Tensor, Tensor]


def index_rows(tokens: int, columns: int, size: int, share: float) -> Tensor:
    """Rows of a store of `size`, some twice, each place filled with probability `share`, else -1."""
    chosen = torch.randint(0, max(size, 1), (tokens, columns))
    return chosen.masked_fill(torch.rand(tokens, columns) >= (share if size else 0.0), -1).to(DEVICE)


def packed(lengths: list[int], rate: int, last: int = 1000) -> Candidates:
    """Candidates of whole sequences, as `PackedContext` gives them; only for the `last` tokens of each."""
    lengths_B = torch.tensor(lengths)
    counts_B = lengths_B // rate
    sequence_T = torch.repeat_interleave(lengths_B.clamp(max=last))
    positions_T = torch.cat([torch.arange(length)[-last:] for length in lengths])
    longest = int(counts_B.max())
    first_B1 = (counts_B.cumsum(0) - counts_B).unsqueeze(1)
    tensors = [tensor.to(DEVICE) for tensor in ((positions_T + 1) // rate, sequence_T, first_B1)]
    return Candidates(*tensors, max(longest, 1), round_up(longest))


def paged(one: Candidates, keys_SD: Tensor, page_size: int) -> tuple[Candidates, Tensor]:
    """The same candidates in a cache whose pages lie in random order, apart, and wider than a key."""
    sequences, pages = len(one.pages_RP), -(-max(one.columns, 1) // page_size)
    apart = page_size + 3
    first_RP = torch.randperm(sequences * pages).view(sequences, pages).to(DEVICE) * apart
    cache = normal(sequences * pages * apart, keys_SD.shape[1] + 9).to(keys_SD.dtype)
    other = Candidates(one.count_T, one.sequence_T, first_RP, page_size, one.columns)
    column = cache[:, 5 : 5 + keys_SD.shape[1]]
    rows, moved = one.rows_TE, other.rows_TE
    column[moved[rows >= 0]] = keys_SD[rows[rows >= 0]]
    return other, column


def made(candidates: Candidates, heads: int = 3, dim: int = 24, dtype: torch.dtype = torch.float32) -> Inputs:
    """Queries, weights and keys for them."""
    tokens = len(candidates.count_T)
    size = int(candidates.rows_TE.max()) + 1 if candidates.rows_TE.numel() else 0
    q_THD, weights_TH, keys_SD = normal(tokens, heads, dim), normal(tokens, heads), normal(size, dim)
    return q_THD.to(dtype), weights_TH, keys_SD.to(dtype)


def scores(*args: object, **options: object) -> Tensor:
    with running("triton"):
        return kernels.index_scores(*args, **options)  # type: ignore[arg-type]


def topk(*args: object, **options: object) -> Tensor:
    with running("triton"):
        return kernels.index_topk(*args, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples
@given(
    *(seeds, st.integers(0, 9), st.integers(1, 20), st.integers(1, 40), st.integers(0, 20)),
    *(st.sampled_from([0, 16, 80]), st.sampled_from([0.0, 0.6, 1.0])),
)
def test_scores_of_named_rows(
    dtype: torch.dtype, seed: int, tokens: int, heads: int, dim: int, size: int, columns: int, share: float
) -> None:
    torch.manual_seed(seed)
    rows = index_rows(tokens, columns, size, share)

    def run(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, weights, keys: op(q, weights, keys, rows)

    inputs = normal(tokens, heads, dim), normal(tokens, heads), normal(size, dim)
    assert_agrees(run(kernels.index_scores), run(oracle.index_scores), *inputs, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples
@given(
    *(seeds, st.lists(st.integers(0, 20), min_size=1, max_size=4), st.sampled_from([1, 4])),
    *(st.integers(1, 18), st.sampled_from([8, 16, 33])),
)
def test_scores_of_all_entries(
    dtype: torch.dtype, seed: int, lengths: list[int], rate: int, heads: int, dim: int
) -> None:
    torch.manual_seed(seed)
    candidates = packed(lengths, rate)

    def run(op: Callable[..., Tensor], which: Tensor | Candidates) -> Callable[..., Tensor]:
        return lambda q, weights, keys: op(q, weights, keys, which)

    ours, theirs = run(kernels.index_scores, candidates), run(oracle.index_scores, candidates.rows_TE)
    assert_agrees(ours, theirs, *made(candidates, heads, dim), dtype=dtype)


def test_key_gradients_of_many_ranges_of_tokens_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    candidates = packed([20, 3, 70], 1)
    inputs = made(candidates, heads=2, dim=8)
    assert_agrees(
        lambda q, weights, keys: kernels.index_scores(q, weights, keys, candidates),
        lambda q, weights, keys: oracle.index_scores(q, weights, keys, candidates.rows_TE),
        *inputs,
    )
    rows = index_rows(11, 32, 30, 0.8)
    monkeypatch.setattr(indexer, "SHARES", 3 * 32 * 8)  # three tokens at once
    assert_agrees(
        lambda q, weights, keys: kernels.index_scores(q, weights, keys, rows),
        lambda q, weights, keys: oracle.index_scores(q, weights, keys, rows),
        *(normal(11, 2, 8), normal(11, 2), normal(30, 8)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("explicit", [False, True], ids=["all entries", "named rows"])
def test_gradients_have_the_same_bits_every_time(dtype: torch.dtype, explicit: bool) -> None:
    torch.manual_seed(2)
    candidates = packed([50, 21], 1, last=15)
    q, weights, keys = (tensor.to(dtype).requires_grad_() for tensor in made(candidates))
    which = candidates.rows_TE if explicit else candidates
    out = scores(q, weights, keys, which)
    slopes = torch.randn_like(out).masked_fill(out.isinf(), 0)
    first, second = (torch.autograd.grad(scores(q, weights, keys, which), (q, weights, keys), slopes) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tokens_scores_and_choice_do_not_depend_on_its_company(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    lengths, last, k = [21, 1, 0, 14, 132], 6, 9
    together = packed(lengths, 1, last)
    q, weights, keys = made(together, dtype=dtype)
    all_scores, all_chosen = scores(q, weights, keys, together), topk(q, weights, keys, together, k)
    assert torch.equal(scores(q, weights, keys, together), all_scores)
    tokens = torch.arange(len(q), device=DEVICE).split([min(length, last) for length in lengths])
    entries = torch.arange(len(keys), device=DEVICE).split(lengths)
    for number, length in enumerate(lengths):
        if length:
            alone, part = packed([length], 1, last), tokens[number]
            own = q[part], weights[part], keys[entries[number]]
            assert torch.equal(scores(*own, alone), all_scores[part, : alone.columns])
            assert torch.equal(topk(*own, alone, k), all_chosen[part])
    # Sequences in another order.
    order = [4, 1, 3, 0, 2]
    part, turned = torch.cat([tokens[one] for one in order]), packed([lengths[one] for one in order], 1, last)
    own = q[part], weights[part], keys[torch.cat([entries[one] for one in order])]
    assert torch.equal(scores(*own, turned), all_scores[part])
    assert torch.equal(topk(*own, turned, k), all_chosen[part])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_of_a_prefill_and_single_steps_over_pages_give_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    whole, k = packed([140, 33], 1, last=9), 8
    q, weights, keys = made(whole, dtype=dtype)
    wanted, chosen = scores(q, weights, keys, whole), topk(q, weights, keys, whole, k)
    pages, cache = paged(whole, keys, 12)
    assert torch.equal(scores(q, weights, cache, pages), wanted)
    # Rollout caches may hold the same numbers in a wider dtype.
    assert torch.equal(scores(q, weights, cache.float(), pages), wanted)
    for begin, end in [(0, 2), (2, 9), (8, 9), (5, 18), (17, 18)]:
        part = pages.of_tokens(begin, end)
        assert torch.equal(scores(q[begin:end], weights[begin:end], cache, part), wanted[begin:end])
        assert torch.equal(topk(q[begin:end], weights[begin:end], cache, part, k), chosen[begin:end])


def test_more_padding_changes_no_bit() -> None:
    torch.manual_seed(5)
    one = packed([40, 90], 1, last=9)
    q, weights, keys = made(one)
    padded = Candidates(one.count_T, one.sequence_T, one.pages_RP, one.page_size, one.columns + 160)
    less, more = scores(q, weights, keys, one), scores(q, weights, keys, padded)
    assert torch.equal(more[:, : one.columns], less)
    assert bool(more[:, one.columns :].isneginf().all())
    assert torch.equal(topk(q, weights, keys, padded, 8), topk(q, weights, keys, one, 8))


@pytest.mark.parametrize("group", [1, 2, 7, 32])
def test_tokens_that_share_a_tile_of_keys_change_no_bit(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    candidates = packed([40, 0, 25], 1)
    q, weights, keys = made(candidates)
    wanted = scores(q, weights, keys, candidates)
    monkeypatch.setattr(indexer, "PROGRAMS", max(1, len(q) // group))
    assert torch.equal(scores(q, weights, keys, candidates), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@few
@given(seeds, st.lists(st.integers(0, 20), min_size=1, max_size=2), st.sampled_from([1, 4]), st.integers(4, 15))
def test_the_choice_is_that_of_a_stable_sort(
    dtype: torch.dtype, seed: int, lengths: list[int], rate: int, k: int
) -> None:
    torch.manual_seed(seed)
    candidates = packed(lengths, rate)
    q, weights, keys = made(candidates, heads=2, dim=8, dtype=dtype)
    keys = keys[torch.randint(0, max(1, len(keys)), (len(keys),))]  # some twice: equal scores
    found, values = topk(q, weights, keys, candidates, k), scores(q, weights, keys, candidates)
    for t, row in enumerate(values):
        order = torch.sort(row, descending=True, stable=True).indices[:k]
        wanted = order[row[order] > float("-inf")].sort().values.tolist()
        assert found[t].tolist() == wanted + [-1] * (k - len(wanted))


def test_the_choice_in_several_buffers_is_that_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    candidates = packed([60, 55], 1, last=9)
    q, weights, keys = made(candidates)
    wanted = topk(q, weights, keys, candidates, 5)
    monkeypatch.setattr(indexer, "BUFFER", 7 * candidates.columns)
    assert torch.equal(topk(q, weights, keys, candidates, 5), wanted)


@few
@given(seeds, st.sampled_from([1, 5, 64]), st.sampled_from([3, 40, 700]), st.booleans())
def test_topk_is_that_of_a_stable_sort(seed: int, k: int, columns: int, streamed: bool) -> None:
    torch.manual_seed(seed)
    values = normal(4, columns, scale=3)
    values[1] = values[1].round()  # ties, and both zeros
    values[2, torch.rand(columns) < 0.9] = float("-inf")
    values[3, ::2] = float("nan")
    values[3, 1::4] = float("inf")
    with pytest.MonkeyPatch.context() as patch, running("triton"):
        if streamed:
            patch.setattr(triton_topk, "RESIDENT", 0)
            patch.setattr(triton_topk, "STREAMED", 256)
        found = kernels.topk_stable(values, k)
        assert torch.equal(found, oracle.topk_stable(values, k))
        assert torch.equal(kernels.topk_stable(values.bfloat16(), k), oracle.topk_stable(values.bfloat16(), k))


def test_topk_of_nothing() -> None:
    with running("triton"):
        assert kernels.topk_stable(normal(0, 5), 3).shape == (0, 3)
        assert kernels.topk_stable(normal(3, 0), 3).shape == (3, 0)
        assert kernels.topk_stable(normal(2, 3, 4), 2).shape == (2, 3, 2)
    nothing = packed([0], 4)
    assert topk(*made(nothing), nothing, 4).shape == (0, 4)


def test_without_a_choice_all_entries_are_taken_in_order() -> None:
    candidates = packed([5, 3], 2)
    found = topk(*made(candidates), candidates, 16)
    assert found[4].tolist() == [0, 1] + [-1] * 14
    assert found[5].tolist() == [-1] * 16
    assert candidates.rows_of(found)[7, :2].tolist() == [2, -1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples
@given(seeds, st.integers(0, 6), st.sampled_from([0, 16, 1040]), st.sampled_from([0.0, 0.5, 1.0]))
def test_divergence(dtype: torch.dtype, seed: int, tokens: int, columns: int, share: float) -> None:
    torch.manual_seed(seed)
    missing = torch.rand(tokens, columns, device=DEVICE) >= share
    target = normal(tokens, columns).square() * (torch.rand(tokens, columns, device=DEVICE) < 0.7)
    target[:1] = 0

    def run(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda values: op(values.masked_fill(missing, float("-inf")), target.to(values.dtype))

    target = target.to(dtype)
    assert_agrees(
        run(kernels.index_divergence), run(oracle.index_divergence), normal(tokens, columns, scale=4), dtype=dtype
    )


def test_divergence_knows_its_zero_and_its_padding() -> None:
    torch.manual_seed(8)
    values = normal(5, 1200, scale=3)
    values[3, 40:] = float("-inf")
    with running("triton"):
        zero = kernels.index_divergence(values, 7 * values.softmax(-1))
        assert zero.abs().max() < 1e-5
        target = normal(5, 1200).square()
        plain = kernels.index_divergence(values, target)
        wider = torch.nn.functional.pad(values, (0, 1000), value=float("-inf"))
        assert torch.equal(kernels.index_divergence(wider, torch.nn.functional.pad(target, (0, 1000), value=3)), plain)
        assert torch.equal(kernels.index_divergence(values[2:3], target[2:3]), plain[2:3])
    assert triton_divergence.TILE < 1200


@pytest.mark.parametrize("explicit", [False, True], ids=["all entries", "named rows"])
def test_fp4_rounds_queries_and_keys_and_gradients_pass_straight_through(explicit: bool) -> None:
    torch.manual_seed(9)
    candidates = packed([30], 1)
    q, weights, keys = (tensor.requires_grad_() for tensor in made(candidates, dim=64))
    which = candidates.rows_TE if explicit else candidates
    rounded = [fake_quantize_mxfp4(tensor.detach()).requires_grad_() for tensor in (q, keys)]
    found, wanted = scores(q, weights, keys, which, precision="fp4"), scores(rounded[0], weights, rounded[1], which)
    assert torch.equal(found, wanted)
    slopes = torch.randn_like(found).masked_fill(found.isinf(), 0)
    straight = torch.autograd.grad(found, (q, weights, keys), slopes)
    exact = torch.autograd.grad(wanted, (rounded[0], weights, rounded[1]), slopes)
    assert all(torch.equal(one, other) for one, other in zip(straight, exact, strict=True))
    # Keys that a cache holds rounded stay as they are.
    assert torch.equal(scores(q, weights, rounded[1], which, precision="fp4"), wanted)
    chosen = topk(q, weights, keys, candidates, 4, precision="fp4")
    assert torch.equal(chosen, topk(rounded[0], weights, rounded[1], candidates, 4))


ONE = packed([4], 1)
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: scores(normal(4, 2, 8), normal(4, 3), normal(4, 8), ONE), r"index_scores: weights has shape \[4, 3\]"),
    (lambda: topk(normal(4, 2, 8), normal(4, 2), normal(4, 7), ONE, 2), r"index_topk: keys has shape \[4, 7\]"),
    (lambda: topk(normal(3, 2, 8), normal(3, 2), normal(4, 8), ONE, 2), r"count of candidates has shape \[4\]"),
    (lambda: topk(normal(4, 2, 8), normal(4, 2), normal(4, 8), ONE, 0), "k is 0; expected at least 1"),
    (
        lambda: topk(*made(ONE), Candidates(ONE.count_T, ONE.sequence_T, ONE.pages_RP, 4, 20), 2),
        "candidates have 20 columns and pages of 4; expected a multiple of 16",
    ),
    (
        lambda: scores(*made(ONE), ONE.rows_TE.int()),
        r"index_scores: candidates is torch.int32; expected torch.int64",
    ),
    (lambda: scores(*made(ONE), ONE, precision="fp8"), "precision is 'fp8'; expected None or one of"),
    (lambda: kernels.index_divergence(normal(2, 16), normal(2, 32)), r"target has shape \[2, 32\]; expected \[2, 16\]"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_bad_argument_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
