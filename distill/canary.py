"""What a teacher must show before the first step: that it was trained, is whole, and speaks the student's language."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.prefill import states_of
from posttrain.errors import BadInput
from posttrain.kernels import linear_logprob

TRAINED_ENTROPY = 0.95
"""Share of log V above which the mean entropy of a teacher's predictions is that of random weights."""


@dataclass(frozen=True)
class Canary:
    """What is asked of every teacher."""

    prompts: Sequence[Sequence[int]]
    """The same for every teacher; each of at least one token."""
    vocabulary: int
    """Rows of the student's head."""
    eos: Sequence[int] = ()
    """The tokens that the student may end with; a teacher must end with one of them. Empty: it is not compared."""
    tokens: str | None = None
    """`vocabulary_digest` of the student's tokenizer; None: it is not compared."""


@dataclass(frozen=True)
class Evidence:
    """What a teacher showed."""

    entropy: float
    """Mean over all positions of the prompts, nats."""
    uniform: float
    """log V."""


def vocabulary_digest(directory: Path) -> str | None:
    """A hash of the tokens of the tokenizer in `directory` and their ids; None where there is no tokenizer.json."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    described = json.loads(path.read_text())
    tokens = described.get("model", {}).get("vocab", {})
    pairs = tokens.items() if isinstance(tokens, dict) else ((str(entry), i) for i, entry in enumerate(tokens))
    added = [(token["content"], token["id"]) for token in described.get("added_tokens", [])]
    return hashlib.sha256(json.dumps(sorted({*pairs, *added})).encode()).hexdigest()


def examine(name: str, model: PreTrainedModel, path: Path, canary: Canary, outside: bool, device: str) -> Evidence:
    """Hold a loaded teacher against the canary.

    Args:
        outside: the teacher is not of this run: its tokenizer is compared as well, and its predictions must not be as
            spread as those of random weights.

    Raises:
        BadInput: it cannot teach this student; the message has the evidence.
    """
    head_VH = model.get_output_embeddings().weight
    if head_VH.size(0) != canary.vocabulary:
        from distill.divergence import vocabulary_mismatch

        raise BadInput(vocabulary_mismatch(f"the teacher {name}", head_VH.size(0), canary.vocabulary))
    _check_end(name, model, canary)
    if outside:
        _check_tokens(name, path, canary)
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for tensor_name, tensor in tensors:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise BadInput(
                    f"the teacher {name} is damaged: the {kind} {tensor_name} has values that are not finite"
                )
    states_NH = torch.cat(states_of(model, [[*p, 0] for p in canary.prompts], [*map(len, canary.prompts)], device))
    return _check_predictions(name, states_NH, head_VH, outside)


def _check_tokens(name: str, path: Path, canary: Canary) -> None:
    theirs = vocabulary_digest(path)
    if None not in (theirs, canary.tokens) and theirs != canary.tokens:
        raise BadInput(
            f"the teacher {name} has another tokenizer: as many tokens as the student's, but not the same under the "
            f"same ids (digests {str(theirs)[:12]} and {str(canary.tokens)[:12]}); it must be trained on the student's"
        )


def _check_end(name: str, model: PreTrainedModel, canary: Canary) -> None:
    ends = end_tokens(model)
    if canary.eos and ends and not set(ends) & set(canary.eos):
        raise BadInput(
            f"the teacher {name} ends with token {ends} (eos_token_id), the student with {list(canary.eos)}: answers "
            "would never end, or too early. Fix the teacher's config.json, or take a teacher with this end of sequence"
        )


def end_tokens(model: PreTrainedModel) -> list[int]:
    """What the model's configurations name as ends of a sequence."""
    values = (model.config.eos_token_id, getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    lists = [[] if value is None else [value] if isinstance(value, int) else value for value in values]
    return sorted(set(chain.from_iterable(lists)))


def _check_predictions(name: str, states_NH: Tensor, head_VH: Tensor, outside: bool) -> Evidence:
    finite_N = torch.isfinite(states_NH).all(-1)
    if not bool(finite_N.all()):
        raise BadInput(
            f"the teacher {name} is damaged: {int((~finite_N).sum())} of {len(states_NH)} hidden states of the canary "
            "prompts are not finite"
        )
    _, entropy_N = linear_logprob(states_NH, head_VH, torch.zeros_like(states_NH[:, 0], dtype=torch.int64))
    evidence = Evidence(entropy_N.mean().item(), math.log(head_VH.size(0)))
    if not math.isfinite(evidence.entropy):
        raise BadInput(f"the teacher {name} is damaged: its predictions on the canary prompts are not finite")
    if outside and evidence.entropy > TRAINED_ENTROPY * evidence.uniform:
        raise BadInput(
            f"the teacher {name} looks untrained: the mean entropy of its predictions on {len(states_NH)} positions of "
            f"the canary prompts is {evidence.entropy:.3f} nats, that of guessing {evidence.uniform:.3f}; were its "
            "weights loaded from the right files?"
        )
    return evidence
