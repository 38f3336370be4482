"""Objectives for indexers and routers: their values and gradients, and that nothing else feels what it should not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.models.deepseek_v4.auxiliary import (
    Auxiliary,
    attention_target,
    indexer_loss,
    indexer_parameters,
    router_scores,
    sequence_balance,
)
from posttrain.models.deepseek_v4.layers import Attention, Compressor, Gate, Rope
from tests.v4_models import VOCABULARY, our_model

EVERYTHING: dict[str, float] = {"indexer": 0.7, "balance": 0.3, "bias_update": 1e-3}


def random_rows(tokens: int, columns: int, stored: int) -> Tensor:
    """Distinct rows in any order, -1 between them; one token has all of them, one has none."""
    rows = torch.stack([torch.randperm(stored)[:columns] for _ in range(tokens)])
    rows[torch.rand(tokens, columns) < 0.4] = -1
    rows[0], rows[1] = torch.arange(columns), -1
    return rows


@pytest.mark.parametrize("chunk", [1, 1 << 25], ids=["token by token", "at once"])
def test_the_divergence_and_its_gradient_are_those_of_a_dense_reconstruction(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.models.deepseek_v4.auxiliary.GATHERED", chunk)
    torch.manual_seed(0)
    tokens, heads, dim, stored = 7, 3, 8, 40
    q, near, far = (torch.randn(*shape).double() for shape in ((tokens, heads, dim), (20, dim), (stored, dim)))
    near_rows, far_rows = random_rows(tokens, 16, 20), random_rows(tokens, 32, stored)
    sink, scale = torch.randn(heads).double(), 0.4
    index_q, index_w, index_k = (
        torch.randn(*shape).double().requires_grad_() for shape in ((tokens, 2, 16), (tokens, 2), (stored, 16))
    )

    target = attention_target(q, (near, near_rows), (far, far_rows), sink, scale)
    loss = indexer_loss(index_q, index_w, index_k, far_rows, target)
    gradients = torch.autograd.grad(loss, (index_q, index_w, index_k))

    terms = []
    for t in range(tokens):
        chosen = far_rows[t][far_rows[t] >= 0]
        if not len(chosen):
            assert bool((target[t] == 0).all())
            continue
        logits = torch.cat((near[near_rows[t][near_rows[t] >= 0]], far[chosen])) @ q[t].T * scale
        weights = torch.cat((logits, sink.unsqueeze(0))).softmax(0)[-1 - len(chosen) : -1]
        p = weights.sum(1) / weights.sum()
        scores = ((index_k[chosen] @ index_q[t].T).relu() * index_w[t]).sum(1)
        terms.append((p * (p.log() - scores.log_softmax(0))).sum())
    expected = torch.stack(terms).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-13)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (index_q, index_w, index_k)), strict=True):
        assert theirs.abs().max() > 1e-3
        assert (ours - theirs).abs().max() < 1e-13


def test_attention_far_from_every_entry_still_gives_a_target() -> None:
    q, far = torch.ones(1, 2, 8), torch.stack([torch.full((8,), value) for value in (-100.0, -101.0)])
    rows = torch.tensor([[0, 1, *[-1] * 14]])
    target = attention_target(q, (torch.full((1, 8), 100.0), rows.clamp(max=0)), (far, rows), torch.zeros(2), 1.0)
    assert target[0, :2].tolist() == pytest.approx([1 / (1 + 2.718281828**-8), 1 / (1 + 2.718281828**8)], rel=1e-5)


def divergences(model: DeepseekV4ForCausalLM, tokens: Tensor, **fields: Any) -> Tensor:
    """The unweighted sum of the indexers' divergences."""
    model.model.auxiliary = Auxiliary(indexer=1.0, **fields)
    model(tokens)
    loss, _ = model.model.auxiliary.take_loss()
    model.model.auxiliary = None
    assert loss is not None
    return loss


class Reconstruction:
    """One CSA layer on one sequence in plain torch and fp64, token by token, from the input that it got."""

    def __init__(self, layer: Attention, x: Tensor, rope: Rope) -> None:
        self.layer, self.rope, self.x = layer, rope, x.detach().double()
        self.weights = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}

    def rotate(self, x: Tensor, position: int) -> Tensor:
        cos, sin = self.rope.cos_PR[position].double(), self.rope.sin_PR[position].double()
        rest, even, odd = x[..., : -2 * len(cos)], x[..., -2 * len(cos) :: 2], x[..., 1 - 2 * len(cos) :: 2]
        pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
        return torch.cat((rest, pairs.flatten(-2)), -1)

    def norm(self, x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.layer.eps).sqrt() * weight

    def entries(self, compressor: Compressor, prefix: str) -> Tensor:
        w = {name.removeprefix(prefix): weight for name, weight in self.weights.items() if name.startswith(prefix)}
        values, gates = self.x @ w["wkv.weight"].T, self.x @ w["wgate.weight"].T
        dim, rate, found = compressor.head_dim, compressor.rate, []
        for start in range(0, len(self.x) - rate + 1, rate):
            own, before = slice(start, start + rate), slice(start - rate, start)
            value, gate = values[own, dim:], gates[own, dim:] + w["ape"][:, dim:]
            if start:
                value = torch.cat((values[before, :dim], value))
                gate = torch.cat((gates[before, :dim] + w["ape"][:, :dim], gate))
            entry = self.norm((gate.softmax(0) * value).sum(0), w["norm.weight"])
            found.append(self.rotate(entry, start))
        return torch.stack(found)

    def divergence(self, chosen_only: bool) -> Tensor:
        layer, w = self.layer, self.weights
        latent = self.norm(self.x @ w["wq_a.weight"].T, w["q_norm.weight"]).detach()
        far = self.entries(layer.compressor, "compressor.").detach()
        keys = self.entries(layer.indexer.compressor, "indexer.compressor.")
        near = self.norm(self.x @ w["wkv.weight"].T, w["kv_norm.weight"])
        near = torch.stack([self.rotate(row, t) for t, row in enumerate(near)])
        scaled = (layer.indexer.heads * layer.indexer.head_dim) ** -0.5
        terms = []
        for t in range(layer.compressor.rate - 1, len(self.x)):
            complete = (t + 1) // layer.compressor.rate
            query = self.rotate((latent[t] @ w["indexer.wq_b.weight"].T).view(layer.indexer.heads, -1), t)
            scores = (keys[:complete] @ query.T).relu() @ (self.x[t] @ w["indexer.weights_proj.weight"].T * scaled)
            seen = scores.topk(min(layer.indexer.topk, complete)).indices if chosen_only else torch.arange(complete)
            q = self.rotate(self.norm((latent[t] @ w["wq_b.weight"].T).view(layer.heads, -1)), t)
            logits = torch.cat((near[max(0, t + 1 - layer.width) : t + 1], far[seen])) @ q.T * layer.head_dim**-0.5
            attention = torch.cat((logits, w["attn_sink"].unsqueeze(0))).softmax(0)[-1 - len(seen) : -1]
            p = (attention.sum(1) / attention.sum()).detach()
            terms.append((p * (p.log() - scores[seen].log_softmax(0))).sum())
        return torch.stack(terms).mean()


@pytest.mark.parametrize("all_candidates", [False, True], ids=["sparse", "warm-up"])
def test_the_models_indexers_get_the_gradient_of_a_reconstruction_in_fp64(all_candidates: bool) -> None:
    model = our_model(1)
    inputs: dict[str, tuple] = {}
    for layer in (1, 3):
        attention = model.model.layers[layer].attn
        attention.register_forward_pre_hook(lambda module, args: inputs.update({module.name: args}))
    loss = divergences(model, torch.randint(0, VOCABULARY, (1, 46)), all_candidates=all_candidates)
    loss.backward()
    total = 0.0
    for layer in (1, 3):
        attention = model.model.layers[layer].attn
        x, rope, _ = inputs[attention.name]
        dense = Reconstruction(attention, x, rope)
        expected = dense.divergence(chosen_only=not all_candidates)
        expected.backward()
        total += expected.item()
        for name, parameter in attention.indexer.named_parameters():
            gradient = dense.weights[f"indexer.{name}"].grad
            assert parameter.grad is not None and gradient is not None and gradient.abs().max() > 1e-6, name
            assert (parameter.grad - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
    assert loss.item() == pytest.approx(total, rel=1e-5)
    others = {id(parameter) for parameter in indexer_parameters(model)}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in others)


def packed_inputs(lengths: list[int]) -> dict[str, Tensor]:
    parts = [torch.randint(0, VOCABULARY, (length,)) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {"input_ids": torch.cat(parts).unsqueeze(0), "position_ids": positions.unsqueeze(0)}


def padded_inputs(lengths: list[int]) -> dict[str, Tensor]:
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return {"input_ids": torch.randint(0, VOCABULARY, mask.shape), "attention_mask": mask}


@pytest.mark.parametrize("layout", [packed_inputs, padded_inputs])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_no_objective_changes_a_bit_of_the_logits(layout: Callable, checkpointing: bool) -> None:
    model = our_model(2).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = layout([40, 3, 21])
    off = model(**inputs).logits
    for fields in (EVERYTHING, {"indexer": 1.0, "all_candidates": True}):
        model.model.auxiliary = Auxiliary(**fields)
        assert torch.equal(off, model(**inputs).logits)
        assert model.model.auxiliary.take_loss()[0] is not None


def gradients(model: DeepseekV4ForCausalLM, inputs: dict[str, Tensor], **fields: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    if fields:
        model.model.auxiliary = Auxiliary(**fields)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss = loss + model.model.auxiliary.take_loss()[0]
        model.model.auxiliary = None
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_the_indexers_objective_changes_no_bit_of_other_gradients(checkpointing: bool) -> None:
    model, inputs = our_model(3).train(), packed_inputs([40, 3, 21])
    off, plain = gradients(model, inputs), gradients(model, inputs, indexer=1.0)
    if checkpointing:
        model.gradient_checkpointing_enable()
    on = gradients(model, inputs, indexer=1.0)
    indexers = {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert set(on) == set(off) | indexers and not indexers & set(off)
    assert all(torch.equal(off[name], on[name]) for name in off)
    assert all(torch.equal(plain[name], on[name]) and on[name].abs().max() > 0 for name in indexers)


def test_checkpointing_changes_no_bit_with_everything_on() -> None:
    model, inputs = our_model(4).train(), packed_inputs([40, 3, 21])
    plain = gradients(model, inputs, **EVERYTHING)
    model.gradient_checkpointing_enable()
    saving = gradients(model, inputs, **EVERYTHING)
    assert set(plain) == set(saving)
    assert all(torch.equal(plain[name], saving[name]) for name in plain)


def test_a_layer_run_again_for_its_gradient_is_counted_once() -> None:
    model, inputs = our_model(4).train(), packed_inputs([40, 3, 21])
    model.gradient_checkpointing_enable()
    model.model.auxiliary = Auxiliary(**EVERYTHING)
    model(**inputs).logits.sum().backward()
    loads = model.model.auxiliary.update_biases(model.model)
    assert sorted(loads) == [1, 2, 3]  # layer 0 routes by table
    assert all(int(load.sum()) == 64 * model.config.num_experts_per_tok for load in loads.values())


def test_packed_sequences_have_the_objectives_of_single_ones() -> None:
    model, lengths = our_model(5), [40, 3, 21, 8]
    inputs = packed_inputs(lengths)
    parts = inputs["input_ids"].split(lengths, 1)

    def values(batches: list[dict[str, Tensor]]) -> list[dict[str, float]]:
        found = []
        for batch in batches:
            model.model.auxiliary = Auxiliary(**EVERYTHING)
            model(**batch)
            found.append(model.model.auxiliary.take_loss()[1])
        return found

    (together,), alone = values([inputs]), values([{"input_ids": part} for part in parts])
    with_entry = [max(0, length - 3) for length in lengths]  # the first complete block ends at the fourth token
    kl = sum(one.get("indexer_kl", 0.0) * n for one, n in zip(alone, with_entry, strict=True)) / sum(with_entry)
    assert together["indexer_kl"] == pytest.approx(kl, rel=1e-5)
    assert together["balance_loss"] == pytest.approx(sum(one["balance_loss"] for one in alone) / 4, rel=1e-5)


def test_sequences_too_short_for_an_entry_and_passes_without_gradient_leave_nothing() -> None:
    model = our_model(5)
    model.model.auxiliary = Auxiliary(indexer=1.0)
    model(torch.randint(0, VOCABULARY, (2, 3)))
    assert model.model.auxiliary.take_loss() == (None, {})
    model.model.auxiliary.update_biases(model.model)
    with torch.no_grad():
        model(torch.randint(0, VOCABULARY, (2, 30)))
    assert model.model.auxiliary.take_loss() == (None, {})
    assert model.model.auxiliary.update_biases(model.model) == {}


def recall(model: DeepseekV4ForCausalLM, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> float:
    """Share of the entries with most attention, were all attended to, that the indexers choose."""
    chosen: list[Tensor] = []
    shares: list[float] = []

    def compare(q: Tensor, window: tuple, compressed: tuple, *rest: Any) -> Tensor:
        target, rows = attention_target(q, window, compressed, *rest), compressed[1]
        for paid, found, complete in zip(target, chosen.pop(), rows, strict=True):
            taken = set(found[found >= 0].tolist())
            if (complete >= 0).sum() > len(taken):
                shares.append(len(taken & set(complete[paid.topk(len(taken)).indices].tolist())) / len(taken))
        return target

    indexers = [layer.attn.indexer for layer in model.model.layers if hasattr(layer.attn, "indexer")]
    hooks = [indexer.register_forward_hook(lambda _, args, out: chosen.append(out)) for indexer in indexers]
    with monkeypatch.context() as patch:
        patch.setattr("posttrain.models.deepseek_v4.layers.attention_target", compare)
        divergences(model, tokens, all_candidates=True)
    for hook in hooks:
        hook.remove()
    return sum(shares) / len(shares)


@pytest.mark.parametrize("all_candidates", [False, True], ids=["sparse", "warm-up"])
def test_training_indexers_alone_lowers_their_divergence_and_finds_more_of_the_best(
    all_candidates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = our_model(6), torch.randint(0, VOCABULARY, (4, 64))
    optimizer = torch.optim.AdamW(indexer_parameters(model), lr=1e-2, weight_decay=0.0)
    before, kls = recall(model, tokens, monkeypatch), []
    model.model.auxiliary = Auxiliary(indexer=1.0, all_candidates=all_candidates)
    for _ in range(40):
        model(tokens)
        loss, values = model.model.auxiliary.take_loss()
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kls.append(values["indexer_kl"])
    assert kls[-1] < 0.5 * kls[0]
    assert recall(model, tokens, monkeypatch) > before + 0.1


def test_the_balance_loss_is_the_one_computed_by_hand() -> None:
    # two sequences, 4 experts, top-2; affinities of each token sum to 1 already in the first, to 2 in the second
    scores = torch.tensor(
        [[0.4, 0.3, 0.2, 0.1], [0.5, 0.1, 0.3, 0.1], [0.2, 1.0, 0.4, 0.4]], dtype=torch.float64, requires_grad=True
    )
    loss = sequence_balance(scores, 2, [2, 0, 1])
    # first: f = 4/(2·2)·(2, 1, 1, 0), P = (0.45, 0.2, 0.25, 0.1); second (tie to the lowest): f = 2·(0, 1, 1, 0)
    first, second = 2 * 0.45 + 0.2 + 0.25, 2 * 0.5 + 2 * 0.2
    assert loss.item() == pytest.approx((first + second) / 2, abs=1e-15)
    loss.backward()
    # d(f·P)/ds of the second: (f - f·s') / sum(s), halved by the mean over sequences
    expected = (torch.tensor([0.0, 2.0, 2.0, 0.0]).double() - second) / 2 / 2
    assert scores.grad is not None and (scores.grad[2] - expected).abs().max() < 1e-15
    even = torch.full((5, 4), 0.25)
    assert sequence_balance(even, 4, [5]).item() == pytest.approx(1.0)


def test_router_scores_have_a_gradient_where_they_vanish() -> None:
    weight = torch.tensor([[-300.0], [2.0]], requires_grad=True)
    scores = router_scores(torch.ones(1, 1), weight)
    assert scores[0, 1].item() == pytest.approx(torch.nn.functional.softplus(torch.tensor(2.0)).sqrt().item(), rel=1e-6)
    scores.sum().backward()
    assert weight.grad is not None and bool(torch.isfinite(weight.grad).all()) and weight.grad[1] > 0


def test_biases_are_fp32_in_a_model_of_another_dtype() -> None:
    config = our_model(8).config
    torch.set_default_dtype(torch.bfloat16)
    try:
        gate = Gate(config, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (gate.weight.dtype, gate.bias.dtype) == (torch.bfloat16, torch.float32)


def violation(loads: dict[int, Tensor]) -> float:
    return max((load.max() / load.float().mean()).item() for load in loads.values())


def test_biases_move_skewed_loads_towards_balance() -> None:
    model, tokens = our_model(7), torch.randint(0, VOCABULARY, (4, 32))
    tables = model.model.layers[0].ffn.gate.tid2eid.clone()
    for layer in model.model.layers[1:]:
        layer.ffn.gate.bias.copy_(torch.tensor([1.0, 1.0, *[0.0] * 6]))  # two experts get everything
    model.model.auxiliary = Auxiliary(bias_update=0.01)
    seen = []
    for _ in range(100):
        model(tokens)
        seen.append(violation(model.model.auxiliary.update_biases(model.model)))
    assert seen[0] == 4.0  # 8 experts, 2 of them loaded
    assert seen[-1] < 1.5
    assert torch.equal(tables, model.model.layers[0].ffn.gate.tid2eid)


def test_one_bias_update_is_the_sign_of_the_load_of_all_passes_since_the_last() -> None:
    model = our_model(8)
    model.model.auxiliary = Auxiliary(bias_update=1e-3)
    before = {layer: model.model.layers[layer].ffn.gate.bias.clone() for layer in (1, 2, 3)}
    counts = {layer: torch.zeros(8) for layer in before}

    def count(module: Gate, args: tuple, routes: tuple[Tensor, Tensor]) -> None:
        counts[module.layer] += torch.bincount(routes[0].flatten(), minlength=8)

    for layer in counts:
        model.model.layers[layer].ffn.gate.register_forward_hook(count)
    for length in (30, 5):
        model(torch.randint(0, VOCABULARY, (2, length)))
    loads = model.model.auxiliary.update_biases(model.model)
    for layer, counted in counts.items():
        assert torch.equal(loads[layer].float(), counted)
        moved = before[layer] + 1e-3 * torch.sign(counted.mean() - counted)
        assert torch.equal(model.model.layers[layer].ffn.gate.bias, moved)
    assert model.model.auxiliary.update_biases(model.model) == {}
