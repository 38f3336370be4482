"""Routers and experts on Triton: against the oracle in fp64, and bit for bit against themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain import kernels
from posttrain.kernels.moe import oracle
from posttrain.kernels.moe import triton as moe
from posttrain.kernels.moe.triton_plan import make_plan
from posttrain.kernels.moe.triton_route import router_logits
from posttrain.kernels.quant.op import pack_rows_mxfp4, unpack_rows_mxfp4
from tests.triton_kit import BOUNDS, DEVICE, assert_agrees, assert_close, normal, running

seeds = st.integers(0, 2**31)
rows = st.integers(0, 40)
sizes = st.sampled_from([1, 13, 24, 40])  # few: each is compiled for itself on a GPU
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
examples = settings(max_examples=15, deadline=None, derandomize=True)

ROUTER_BOUND = {torch.float32: 2e-5, torch.bfloat16: 4e-3}
"""Results are fp32 whatever comes; gradients of bf16 inputs are rounded once, by 2**-9 at most: twice that."""


def choose(tokens: int, k: int, used: int) -> Tensor:
    """Experts of slots among the first `used`; a token may choose one twice."""
    return torch.randint(0, used, (tokens, k)).to(DEVICE)


def weights_of(experts: int, hidden: int, inner: int) -> tuple[Tensor, Tensor]:
    """Matrices whose products keep the size of what they multiply."""
    return normal(experts, 2 * inner, hidden, scale=hidden**-0.5), normal(experts, hidden, inner, scale=inner**-0.5)


def agree(tokens: int, chosen: Tensor, sizes: tuple[int, int, int], limit: float, dtype: torch.dtype) -> None:
    experts, hidden, inner = sizes
    assert_agrees(
        lambda x, weights, w13, w2: kernels.moe_experts(x, chosen, weights, w13, w2, limit),
        lambda x, weights, w13, w2: oracle.moe_experts(x, chosen, weights, w13, w2, limit),
        *(normal(tokens, hidden), normal(tokens, chosen.shape[1]), *weights_of(experts, hidden, inner)),
        dtype=dtype,
    )


@examples
@given(
    *(seeds, rows, sizes, sizes, st.sampled_from([1, 3, 7])),
    *(st.sampled_from([0.1, 1.0, 10.0]), dtypes, st.data()),
)
def test_experts_agree_with_the_oracle(
    seed: int, tokens: int, hidden: int, inner: int, experts: int, limit: float, dtype: torch.dtype, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    k, used = data.draw(st.integers(1, experts)), data.draw(st.integers(1, experts))
    agree(tokens, choose(tokens, k, used), (experts, hidden, inner), limit, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", [1, 3])
def test_experts_agree_where_one_has_more_rows_than_a_tile_and_others_have_none(used: int, dtype: torch.dtype) -> None:
    torch.manual_seed(used)
    agree(150, choose(150, 2, used), (4, 96, 64), 1.0, dtype)


def test_experts_agree_at_sizes_that_the_copy_engine_reads() -> None:
    torch.manual_seed(0)
    agree(70, choose(70, 2, 3), (3, 128, 64), 10.0, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner"),
    [(1, 32, 32), (9, 96, 64), (70, 128, 256), (150, 160, 96)],  # 2 and 5 steps of 64, the last of half, among them
)
def test_packed_experts_give_the_bits_of_the_numbers_they_stand_for(
    tokens: int, hidden: int, inner: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens)
    chosen, x, weights = choose(tokens, 2, 3), normal(tokens, hidden).to(dtype), normal(tokens, 2)
    packed = [pack_rows_mxfp4(matrix * 2 ** normal(4, 1, 1)) for matrix in weights_of(4, hidden, inner)]
    numbers = [unpack_rows_mxfp4(matrix, dtype) for matrix in packed]
    with running("triton"):
        found = kernels.moe_experts(x, chosen, weights, *packed, 10.0)
        plain = kernels.moe_experts(x, chosen, weights, *numbers, 10.0)
        if DEVICE.type == "cuda":
            assert torch.equal(found, plain)
        else:  # the interpreter's products are numpy's, which add in another order when a matrix lies transposed
            assert_close(found, plain, 1e-6 if dtype is torch.float32 else 2**-7, "packed")
    with running("oracle"):
        assert_close(found, kernels.moe_experts(x, chosen, weights, *packed, 10.0), 2 * BOUNDS[dtype], "packed")


def test_a_plan_orders_slots_by_expert_and_then_by_number() -> None:
    torch.manual_seed(0)
    chosen = torch.randint(-2, 8, (150, 3)).to(DEVICE)  # of 5 experts: some do not exist
    plan = make_plan(chosen, 5, "large", 64)
    numbers, order = chosen.flatten().clamp(-1, 5).sort(stable=True)
    assert torch.equal(plan.order_S, order.int())
    starts = torch.searchsorted(numbers, torch.arange(6, device=DEVICE))
    assert torch.equal(plan.starts_F, starts.int())
    tiles = (starts.diff() + 63) // 64
    assert torch.equal(plan.tile_starts_F[1:], tiles.cumsum(0).int())
    used = torch.arange(5, device=DEVICE).repeat_interleave(tiles).int()
    assert torch.equal(plan.tile_experts_N[: len(used)], used)
    assert (plan.tile_experts_N[len(used) :] == 5).all()


def test_an_expert_without_rows_has_a_gradient_of_zeros() -> None:
    torch.manual_seed(0)
    x, chosen, weights = normal(5, 16), choose(5, 2, 2), normal(5, 2)
    w13, w2 = (matrix.requires_grad_() for matrix in weights_of(3, 16, 8))
    with running("triton"):
        kernels.moe_experts(x, chosen, weights, w13, w2, 10.0).sum().backward()
    assert w13.grad is not None
    assert w2.grad is not None
    assert w13.grad[2].abs().max() == w2.grad[2].abs().max() == 0
    assert w13.grad[:2].abs().amin((1, 2)).max() > 0


def test_frozen_experts_get_no_gradient_and_the_input_the_same() -> None:
    torch.manual_seed(0)
    x, chosen, weights, matrices = normal(9, 32), choose(9, 2, 3), normal(9, 2), weights_of(3, 32, 16)
    gradients = []
    with running("triton"):
        for learned in (True, False):
            leaf, (w13, w2) = x.clone().requires_grad_(), (one.clone().requires_grad_(learned) for one in matrices)
            kernels.moe_experts(leaf, chosen, weights, w13, w2, 10.0).sum().backward()
            gradients.append(leaf.grad)
            assert (w13.grad is not None) is learned
    assert torch.equal(*gradients)


@pytest.mark.parametrize("number", [-1, 3])
def test_an_expert_that_does_not_exist_makes_its_token_nan_and_no_other(number: int) -> None:
    torch.manual_seed(0)
    chosen = choose(6, 2, 3)
    chosen[4, 1] = number
    x, weights = normal(6, 16).requires_grad_(), normal(6, 2).requires_grad_()
    with running("triton"):
        out = kernels.moe_experts(x, chosen, weights, *weights_of(3, 16, 8), 10.0)
        out.nansum().backward()
    broken = torch.arange(6, device=DEVICE) == 4
    assert torch.equal(out.isnan().all(1), broken)
    assert torch.equal(out.isnan().any(1), broken)
    assert weights.grad is not None
    assert weights.grad[~broken].isfinite().all()


@examples
@given(seeds, rows, sizes, sizes, st.sampled_from([0.1, 1.0, 10.0]), dtypes)
def test_shared_expert_agrees_with_the_oracle(
    seed: int, tokens: int, hidden: int, inner: int, limit: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    gate_up, down = (matrix[0] for matrix in weights_of(1, hidden, inner))
    assert_agrees(
        lambda x, gate_up, down: kernels.swiglu_mlp(x, gate_up, down, limit),
        lambda x, gate_up, down: oracle.swiglu(x @ gate_up.t(), limit) @ down.t(),
        *(normal(tokens, hidden), gate_up, down),
        dtype=dtype,
    )


@examples
@given(seeds, rows, sizes, st.sampled_from([1, 6, 40]), dtypes, st.data())
def test_routers_agree_with_the_oracle(
    seed: int, tokens: int, hidden: int, experts: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    k = data.draw(st.integers(1, min(experts, 8)))
    x, weight, bias = normal(tokens, hidden).to(dtype), normal(experts, hidden).to(dtype), normal(experts)
    with running("triton"):
        chosen, weights = kernels.route_topk(x, weight, bias, k, 1.5)
    expected, _ = oracle.route_topk(x.double(), weight.double(), bias.double(), k, 1.5)
    assert torch.equal(chosen, expected)
    assert weights.dtype is torch.float32
    assert_close(weights.sum(1), torch.full((tokens,), 1.5, device=DEVICE), 1e-6, "sum of weights")
    bound = ROUTER_BOUND[dtype]
    assert_agrees(
        lambda x, weight: kernels.route_topk(x, weight, bias, k, 1.5)[1],
        lambda x, weight: oracle.route_topk(x, weight, bias.double(), k, 1.5)[1],
        *(x.clone(), weight.clone()),
        dtype=dtype,
        bound=bound,
    )
    table, ids = torch.rand(11, experts).argsort(1)[:, :k].to(DEVICE), torch.randint(0, 11, (tokens,)).to(DEVICE)
    assert_agrees(
        lambda x, weight: kernels.route_hash(x, weight, table, ids, 2.5)[1],
        lambda x, weight: oracle.route_hash(x, weight, table, ids, 2.5)[1],
        *(x.clone(), weight.clone()),
        dtype=dtype,
        bound=bound,
    )


def test_router_multiplies_an_fp32_weight_with_a_bf16_input_as_exactly_as_fp32() -> None:
    torch.manual_seed(0)
    x, weight = normal(40, 300).bfloat16(), normal(9, 300)
    with running("triton"):
        logits = router_logits(x, weight)
    assert_close(logits, x.double() @ weight.double().t(), 2e-6, "logits")


@pytest.mark.parametrize("bias", [0.0, -3.0, float("-inf")])
def test_ties_go_to_the_lowest_expert(bias: float) -> None:
    with running("triton"):
        chosen, _ = kernels.route_topk(
            torch.zeros(5, 8, device=DEVICE), normal(6, 8), torch.full((6,), bias, device=DEVICE), 3, 1.0
        )
    assert chosen.tolist() == [[0, 1, 2]] * 5


def test_routers_bear_extreme_logits() -> None:
    x = torch.tensor([[1.0], [-1.0]], device=DEVICE)
    weight = torch.tensor([[200.0], [0.0], [-200.0], [-20.0]], device=DEVICE).requires_grad_()
    with running("triton"):
        chosen, weights = kernels.route_topk(x, weight, torch.zeros(4, device=DEVICE), 2, 1.0)
        assert chosen.tolist() == [[0, 1], [2, 3]]
        weights.sum().backward()
        # Far below zero, softplus is the exponential function: the scores keep their ratio.
        table = torch.tensor([[3, 2]], device=DEVICE)
        _, small = kernels.route_hash(x[:1], weight / 4, table, table[0, :1] * 0, 1.0)
    assert torch.isfinite(weights).all()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()
    assert_close(small[0, 1] / small[0, 0], torch.tensor(-22.5, device=DEVICE).exp(), 1e-12, "ratio of scores")


def test_a_table_with_an_expert_that_does_not_exist_makes_its_tokens_nan() -> None:
    table = torch.tensor([[0, 5], [1, 0]], device=DEVICE)
    with running("triton"):
        _, weights = kernels.route_hash(normal(3, 8), normal(4, 8), table, torch.tensor([1, 0, 1], device=DEVICE), 1.0)
    assert weights.isnan().any(1).tolist() == [False, True, False]


def layer(x: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Router, experts and shared expert."""
    chosen, weights = kernels.route_topk(x, inputs["router"], inputs["bias"], 2, 1.5)
    _, hashed = kernels.route_hash(x, inputs["router"], chosen, torch.arange(len(x), device=DEVICE), 1.5)
    routed = kernels.moe_experts(x, chosen, weights, inputs["w13"], inputs["w2"], 1.0)
    shared = kernels.swiglu_mlp(x, inputs["w13"][0], inputs["w2"][0], 1.0)
    return [chosen, weights, hashed, routed, shared]


def batch(tokens: int, dtype: torch.dtype, hidden: int = 96, inner: int = 48) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    w13, w2 = weights_of(3, hidden, inner)
    inputs = {"router": normal(3, hidden).to(dtype), "w13": w13.to(dtype), "w2": w2.to(dtype)}
    return normal(tokens, hidden).to(dtype), inputs | {"bias": normal(3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    x, inputs = batch(180, dtype)
    order = torch.randperm(180, device=DEVICE)
    with running("triton"):
        whole = layer(x, inputs)
        parts = {
            "again": (slice(None), layer(x, inputs)),
            "the first": (slice(0, 1), layer(x[:1], inputs)),
            "the last": (slice(179, 180), layer(x[179:], inputs)),
            "a chunk": (slice(3, 60), layer(x[3:60], inputs)),
            "permuted": (order, layer(x[order], inputs)),
        }
    for what, (place, results) in parts.items():
        for expected, actual in zip(whole, results, strict=True):
            assert torch.equal(expected[place], actual), what


def gradients_of(x: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Of all inputs of the layer that have one, and the layer's results."""
    leaves = {name: one.clone().requires_grad_() for name, one in ({"x": x} | inputs).items() if name != "bias"}
    results = layer(leaves["x"], inputs | leaves)
    torch.manual_seed(1)
    torch.autograd.backward(results[1:], [normal(*one.shape).to(one.dtype) for one in results[1:]])
    return [one.grad for one in leaves.values() if one.grad is not None] + results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_same_bits_in_every_run(dtype: torch.dtype) -> None:
    x, inputs = batch(70, dtype)
    with running("triton"):
        first, second = gradients_of(x, inputs), gradients_of(x, inputs)
    assert len(first) == 4 + 5
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(("name", "value"), [("KEPT_BYTES", 0), ("ROWS_BYTES", 1), ("DESCRIPTORS", False)])
def test_what_saves_memory_or_time_changes_no_bit(name: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, inputs = batch(40, torch.bfloat16, hidden=512, inner=64)
    with running("triton"):
        expected = gradients_of(x, inputs)
        monkeypatch.setattr(moe, name, value)
        actual = gradients_of(x, inputs)
    assert all(torch.equal(one, other) for one, other in zip(expected, actual, strict=True))


def test_no_choice_of_tiles_changes_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, inputs = batch(150, torch.bfloat16, hidden=256, inner=128)
    results = []
    with running("triton"):
        for tiles in ("large", "small", "narrow"):
            monkeypatch.setattr(moe, "tiles_for", lambda *_, tiles=tiles: tiles)
            results.append(layer(x, inputs))
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))


def test_a_tensor_on_another_device_is_named() -> None:
    x, inputs = batch(3, torch.float32)
    elsewhere = torch.zeros(3, 2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"moe_experts: experts is on meta; expected (cpu|cuda:\d+), where x is"):
        kernels.moe_experts(x, elsewhere, normal(3, 2), inputs["w13"], inputs["w2"], 1.0)
