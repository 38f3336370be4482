"""Our V4 against transformers' V4, in fp32, on random configurations."""

from __future__ import annotations

import pytest
import torch

from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.models.deepseek_v4.presets import HEAVY, SLIDING, SPARSE
from tests.v4_models import VOCABULARY, our_model, saved_twin, transformers_model

BOUND = 1e-5

CONFIGURATIONS = {
    "tiny": {},
    "all-sliding": {"layer_types": [SLIDING] * 4, "sliding_window": 8},
    "all-sparse": {"layer_types": [SPARSE] * 4, "index_topk": 3},
    "all-heavy": {"layer_types": [HEAVY] * 4, "compress_rates": {SPARSE: 4, HEAVY: 16}},
    "other-sizes": {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "head_dim": 16,
        "o_groups": 3,
        "o_lora_rank": 8,
        "num_experts_per_tok": 3,
        "hc_mult": 2,
        "sliding_window": 5,
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
        "swiglu_limit": 0.05,
        "routed_scaling_factor": 2.5,
    },
    "yarn": {
        "rope_parameters": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64,
                            "beta_fast": 32, "beta_slow": 1},
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def lowest_index_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers leaves the order of ties to `torch.topk`; V4 models tie often (ReLU scores of exactly 0)."""

    def topk(values: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> object:
        ordered = torch.sort(values, dim=dim, descending=largest, stable=True)
        return torch.return_types.topk((ordered.values.narrow(dim, 0, k), ordered.indices.narrow(dim, 0, k)))

    monkeypatch.setattr(torch, "topk", topk)
    monkeypatch.setattr(torch.Tensor, "topk", topk)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_and_gradients_are_those_of_transformers(name: str, seed: int, tmp_path) -> None:
    theirs = transformers_model(seed, **CONFIGURATIONS[name])
    ours = saved_twin(theirs, tmp_path / "weights")
    tokens = torch.randint(0, VOCABULARY, (3, 75), generator=torch.Generator().manual_seed(seed))

    our_logits, their_logits = ours(tokens).logits, theirs(tokens, use_cache=False).logits
    assert (our_logits - their_logits).abs().max() <= BOUND

    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)) < 0.3, -100)
    our_loss, their_loss = ours(tokens, labels=labels).loss, theirs(tokens, labels=labels, use_cache=False).loss
    assert abs(our_loss.item() - their_loss.item()) <= BOUND
    our_loss.backward()
    their_loss.backward()
    _compare_gradients(ours, theirs, tmp_path / "gradients")


def _compare_gradients(ours: DeepseekV4ForCausalLM, theirs: torch.nn.Module, directory) -> None:
    """Send transformers' gradients through the same save and load as weights, and compare by name."""
    with torch.no_grad():
        gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
        for name, parameter in theirs.named_parameters():
            parameter.copy_(gradients[name] if gradients[name] is not None else torch.zeros_like(parameter))
    expected = dict(saved_twin(theirs, directory).named_parameters())
    without = [name for name, parameter in ours.named_parameters() if parameter.grad is None]
    assert all(".indexer." in name for name in without)
    for name, parameter in ours.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        assert (gradient - expected[name]).abs().max() <= BOUND, name


def test_selection_is_real() -> None:
    """The indexer's choice decides: with every entry chosen, the logits differ."""
    tokens = torch.randint(0, VOCABULARY, (1, 75), generator=torch.Generator().manual_seed(0))
    some, all_entries = our_model(0, index_topk=2), our_model(0, index_topk=32)
    assert torch.equal(some(tokens).logits[:, :8], all_entries(tokens).logits[:, :8])
    assert (some(tokens).logits[:, 40:] - all_entries(tokens).logits[:, 40:]).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_bit(side: str) -> None:
    model = our_model(3)
    lengths = [1, 3, 4, 8, 33, 61]
    tokens = torch.randint(0, VOCABULARY, (len(lengths), 61), generator=torch.Generator().manual_seed(3))
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        mask[row, slice(61 - length, None) if side == "left" else slice(length)] = 1
    padded = model(tokens, attention_mask=mask).logits
    for row in range(len(lengths)):
        alone = model(tokens[row][mask[row].bool()].unsqueeze(0)).logits[0]
        assert torch.equal(padded[row][mask[row].bool()], alone)


def test_packing_changes_no_bit() -> None:
    model = our_model(4)
    parts = [torch.randint(0, VOCABULARY, (length,)) for length in (30, 1, 24, 45, 7)]
    positions = torch.cat([torch.arange(len(part)) for part in parts]).unsqueeze(0)
    packed = model(torch.cat(parts).unsqueeze(0), position_ids=positions).logits[0]
    for part, logits in zip(parts, packed.split([len(part) for part in parts]), strict=True):
        assert torch.equal(logits, model(part.unsqueeze(0)).logits[0])


def test_padded_gradients_are_those_of_single_sequences() -> None:
    model = our_model(5)
    tokens = torch.randint(0, VOCABULARY, (2, 40))
    mask = torch.ones_like(tokens)
    mask[0, :13] = 0
    model(tokens, attention_mask=mask).logits[mask.bool()].square().sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row in range(2):
        model(tokens[row][mask[row].bool()].unsqueeze(0)).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().clamp(min=1)
            assert (parameter.grad - together[name]).abs().max() <= 1e-5 * scale, name


def test_gradient_checkpointing_changes_no_gradient() -> None:
    plain, saving = our_model(6).train(), our_model(6).train()
    saving.gradient_checkpointing_enable()
    tokens = torch.randint(0, VOCABULARY, (2, 30))
    for model in (plain, saving):
        model(tokens, labels=tokens).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert one.grad is None or torch.equal(one.grad, other.grad), name


def test_generation_continues_left_padded_prompts_as_single_ones() -> None:
    model = our_model(7)
    prompts = torch.randint(3, VOCABULARY, (2, 12))
    mask = torch.ones_like(prompts)
    mask[0, :7] = 0
    both = model.generate(
        prompts, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    alone = model.generate(prompts[:1, 7:], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(both[0, 12:], alone[0, 5:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask"),
        ({"position_ids": torch.tensor([[3, 4, 5, 6]])}, "position_ids"),
    ],
)
def test_unusable_inputs_are_refused_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        our_model(0)(torch.zeros(1, 4, dtype=torch.long), **arguments)
