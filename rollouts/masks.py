"""Which tokens top-p left to be drawn, for a trainer that is to compare probabilities over the same tokens.

Sampled under top-p, a token's probability is one among the tokens that were kept; over the whole vocabulary the
trainer would see another policy than the one that sampled ("keep sampling mask", V3.2 report §3.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from rollouts.types import NewTokens

KEY = "posttrain_mask"
"""In a vLLM request's `extra_args`: the sample whose masks are asked for."""

FIELD = "mask"
"""Their name among the per-token fields of the write-ahead log."""

_BITS, _IDS = b"\0", b"\1"


class MaskCapture:
    """Called by the sampler of an engine with the logits of each step, `-inf` where a token was cut off.

    Args:
        runner: vLLM's model runner, which knows whose rows they are.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._latest: dict[str, bytes] = {}

    def __call__(self, logits_BV: torch.Tensor) -> None:
        """Note the rows of samples that asked for it. Of a prompt that is read in parts the last row stays."""
        asked = [
            (row, sample)
            for row, request_id in enumerate(self._runner.input_batch.req_ids)
            if (sample := (self._runner.requests[request_id].sampling_params.extra_args or {}).get(KEY)) is not None
        ]
        if not asked:
            return
        rows, samples = zip(*asked, strict=True)
        kept_RV = (logits_BV[list(rows)] > -np.inf).cpu().numpy()
        self._latest |= {sample: encode_kept(kept_V) for sample, kept_V in zip(samples, kept_RV, strict=True)}

    def take(self, sample: str) -> bytes:
        """The mask of a sample's latest token; nothing if it asked for none."""
        return self._latest.pop(sample, b"")

    def forget(self, samples: Iterable[str]) -> None:
        """Samples that are no longer in the engine."""
        for sample in samples:
            self._latest.pop(sample, None)


def encode_kept(kept_V: np.ndarray) -> bytes:
    """A boolean for each token of the vocabulary, as bits or as the numbers of those that are kept; b"" for all."""
    if kept_V.all():
        return b""
    ids = np.flatnonzero(kept_V).astype("<u4")
    bits = np.packbits(kept_V)
    return _IDS + ids.tobytes() if ids.nbytes < bits.nbytes else _BITS + bits.tobytes()


def decode_kept(blob: bytes, vocabulary: int) -> np.ndarray:
    """What `encode_kept` was given, `[V]`."""
    if not blob:
        return np.ones(vocabulary, dtype=bool)
    if blob[:1] == _BITS:
        return np.unpackbits(np.frombuffer(blob, np.uint8, offset=1), count=vocabulary).astype(bool)
    kept_V = np.zeros(vocabulary, dtype=bool)
    kept_V[np.frombuffer(blob, "<u4", offset=1)] = True
    return kept_V


def masks_of_tokens(new: NewTokens) -> list[bytes]:
    """A mask for each of the tokens. Engines add one at a time."""
    if new.mask and len(new.token_ids) != 1:
        raise ValueError(f"{new.id}: one mask for {len(new.token_ids)} tokens")
    return [new.mask] * len(new.token_ids)


def joined_masks(masks: list[bytes]) -> tuple[bytes, ...] | None:
    """Of a whole sample; None when nothing was ever cut off."""
    return tuple(masks) if any(masks) else None
