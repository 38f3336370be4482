"""The indexer's FP4 path (V4 report §5.2.1) in the model: `indexer_precision: fp4`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posttrain import kernels
from posttrain.kernels.quant.op import fake_quantize_mxfp4
from posttrain.models.deepseek_v4.auxiliary import Auxiliary
from tests.v4_models import VOCABULARY, our_model

FIELDS = {"index_head_dim": 32, "index_topk": 4}


def tokens() -> Tensor:
    """A sequence long enough that indexers have a choice."""
    torch.manual_seed(0)
    return torch.randint(0, VOCABULARY, (1, 60))


def test_choices_are_those_of_rounded_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, rounded = our_model(3, **FIELDS), our_model(3, **FIELDS, indexer_precision="fp4")
    seen: list[tuple[Tensor, Tensor]] = []
    choose = kernels.index_topk

    def watched(q: Tensor, weights: Tensor, keys: Tensor, *others: object) -> Tensor:
        seen.append((q, keys))
        return choose(q, weights, keys, *others)

    monkeypatch.setattr(kernels, "index_topk", watched)
    logits, rounded_logits = plain(tokens()).logits, rounded(tokens()).logits
    (q, keys), (rounded_q, rounded_keys) = seen[0], seen[len(seen) // 2]
    assert torch.equal(rounded_q, fake_quantize_mxfp4(q)) and not torch.equal(rounded_q, q)
    assert torch.equal(rounded_keys, fake_quantize_mxfp4(keys)) and not torch.equal(rounded_keys, keys)
    assert not torch.equal(logits, rounded_logits)


def test_the_indexers_objective_reaches_its_parameters_through_the_rounding() -> None:
    model = our_model(3, **FIELDS, indexer_precision="fp4").train()
    model.model.auxiliary = Auxiliary(indexer=1.0)
    model(tokens())
    loss, _ = model.model.auxiliary.take_loss()
    assert loss is not None
    loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if ".indexer." in name]
    assert gradients and all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"indexer_precision": "int3"}, "indexer_precision is 'int3'; expected fp4"),
        ({"indexer_precision": "fp4", "index_head_dim": 24}, "index_head_dim is 24; indexer_precision fp4 needs a"),
    ],
)
def test_a_precision_that_cannot_be_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        our_model(3, **fields)
