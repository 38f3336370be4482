"""Routing replay in the trainer's model: the given experts are used, and the router still learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, chunks
from posttrain.models.deepseek_v4.layers import Gate
from posttrain.models.deepseek_v4.routing import UNKNOWN
from tests.v4_models import VOCABULARY, our_model

TOKENS = 21


def batch(seed: int = 0, rows: int = 2) -> Tensor:
    torch.manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, TOKENS))


def routers(model: DeepseekV4ForCausalLM) -> list[Gate]:
    return [module for module in model.modules() if isinstance(module, Gate)]


def own_routes(model: DeepseekV4ForCausalLM, tokens_BS: Tensor) -> Tensor:
    """What each layer chooses, `[B, S, L, k]`."""
    chosen: list[Tensor] = []
    hooks = [gate.register_forward_hook(lambda *call: chosen.append(call[2][0])) for gate in routers(model)]
    with torch.no_grad():
        model(tokens_BS)
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen, 1).unflatten(0, tuple(tokens_BS.shape))


def other_routes(model: DeepseekV4ForCausalLM, tokens_BS: Tensor) -> Tensor:
    """Distinct experts for each token and layer, that are not those of highest score."""
    torch.manual_seed(9)
    config = model.config
    shape = (*tokens_BS.shape, config.num_hidden_layers, config.n_routed_experts)
    return torch.rand(shape).argsort(-1)[..., : config.num_experts_per_tok]


def test_replaying_a_models_own_choice_changes_no_bit() -> None:
    model, tokens_BS = our_model(0), batch()
    routes = own_routes(model, tokens_BS)
    with torch.no_grad():
        assert torch.equal(model(tokens_BS, routes=routes).logits, model(tokens_BS).logits)
        assert torch.equal(model(tokens_BS, routes=routes.to(torch.int16)).logits, model(tokens_BS).logits)


def test_given_experts_are_used_and_weighed_by_the_models_own_scores() -> None:
    """The same experts chosen by a bias that outweighs every score (the bias does not weigh)."""
    model = our_model(1)
    tokens_BS = batch(1)
    scored = [gate for gate in routers(model) if not gate.hashed]
    k, experts = model.config.num_experts_per_tok, model.config.n_routed_experts
    routes = own_routes(model, tokens_BS)
    for gate in scored:
        routes[:, :, gate.layer] = torch.tensor([(3 + gate.layer + i) % experts for i in range(k)])
    with torch.no_grad():
        replayed = model(tokens_BS, routes=routes).logits
        plain = model(tokens_BS).logits
        for gate in scored:
            gate.bias.zero_()
            gate.bias[routes[0, 0, gate.layer]] = 1e4
        # The order within a token's experts is the score's there: sums of k terms may differ in the last bits.
        torch.testing.assert_close(model(tokens_BS).logits, replayed, rtol=1e-5, atol=1e-5)
    assert (replayed - plain).abs().max() > 1e-2


def test_unknown_routes_are_the_layers_own_choice() -> None:
    model, tokens_BS = our_model(2), batch(2)
    routes = other_routes(model, tokens_BS)
    with torch.no_grad():
        assert torch.equal(model(tokens_BS, routes=torch.full_like(routes, UNKNOWN)).logits, model(tokens_BS).logits)
        routes[:, : TOKENS // 2] = UNKNOWN  # a prompt whose routes nobody kept
        partly, plain = model(tokens_BS, routes=routes).logits, model(tokens_BS).logits
        assert torch.equal(partly[:, : TOKENS // 2], plain[:, : TOKENS // 2])
        assert not torch.equal(partly[:, TOKENS // 2 :], plain[:, TOKENS // 2 :])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_its_routes_away(side: str) -> None:
    model, tokens_BS = our_model(3), batch(3, rows=1)
    routes = other_routes(model, tokens_BS)
    pad = (4, 0) if side == "left" else (0, 4)
    mask = torch.nn.functional.pad(torch.ones_like(tokens_BS), pad)
    padded = torch.nn.functional.pad(tokens_BS, pad)
    padded_routes = torch.nn.functional.pad(routes, (0, 0, 0, 0, *pad), value=UNKNOWN)
    with torch.no_grad():
        logits = model(padded, attention_mask=mask, routes=padded_routes).logits
        assert torch.equal(logits[mask.bool()], model(tokens_BS, routes=routes).logits[0])


def gradients(model: DeepseekV4ForCausalLM, tokens_BS: Tensor, routes: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens_BS, labels=tokens_BS, routes=routes).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_gradients_reach_the_router_and_the_given_experts_only() -> None:
    model, tokens_BS = our_model(4), batch(4)
    gate = next(gate for gate in routers(model) if not gate.hashed)
    routes = other_routes(model, tokens_BS)
    k = model.config.num_experts_per_tok
    routes[:, :, gate.layer] = torch.arange(1, 1 + k)
    found = gradients(model, tokens_BS, routes)
    layer = f"model.layers.{gate.layer}.ffn"
    assert found[f"{layer}.gate.weight"].abs().max() > 0
    used = found[f"{layer}.experts.w13"].abs().amax((1, 2)) > 0
    assert used.tolist() == [1 <= expert <= k for expert in range(len(used))]


def test_the_routers_gradient_is_that_of_its_weights_on_the_given_experts() -> None:
    """Against finite differences of the loss in one router weight, in the direction of its gradient."""
    model, tokens_BS = our_model(5), batch(5)
    gate = next(gate for gate in routers(model) if not gate.hashed)
    routes = other_routes(model, tokens_BS)
    gradient = gradients(model, tokens_BS, routes)[f"model.layers.{gate.layer}.ffn.gate.weight"]
    step = gradient / gradient.norm() * 2e-2

    def loss(sign: int) -> float:
        with torch.no_grad():
            gate.weight += sign * step
            value = model(tokens_BS, labels=tokens_BS, routes=routes).loss.item()
            gate.weight -= sign * step
        return value

    assert (loss(1) - loss(-1)) / 2 == pytest.approx((gradient * step).sum().item(), rel=2e-2)


@pytest.mark.parametrize("way", ["checkpointed", "in chunks"])
def test_recomputed_layers_are_given_the_same_experts(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens_BS = our_model(6), batch(6)
    routes = other_routes(model, tokens_BS)
    expected = gradients(model, tokens_BS, routes)
    model.train()
    model.gradient_checkpointing_enable()
    if way == "in chunks":
        monkeypatch.setattr(chunks, "TOKENS", 8)
        monkeypatch.setattr(chunks.in_chunks, "__defaults__", (8,))
    found = gradients(model, tokens_BS, routes)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_routes_that_do_not_fit_are_refused() -> None:
    model, tokens_BS = our_model(7), batch(7)
    routes = other_routes(model, tokens_BS)
    with pytest.raises(ValueError, match=r"\[batch, length, layers, k\] is \(2, 21, "):
        model(tokens_BS, routes=routes[:, :-1])
    with pytest.raises(ValueError, match="outside 0 to 7"):
        model(tokens_BS, routes=routes + 1)
