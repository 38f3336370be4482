"""A tiny language model, its tokenizer, and a sampler in the process: what the trainers' tests share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from posttrain.trainers.generation import derive_seed
from posttrain.trainers.jobs import Prompt
from rollouts.types import Completion, FinishedGroup, GroupRequest, Sampling, version_spans

# As in the actors; sums then have one order, and runs can be compared element by element.
torch.set_num_threads(1)

PAD, EOS, FIRST_LETTER = 0, 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789+-= ?"
VOCABULARY = 2 + len(LETTERS)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def tiny_model(seed: int, vocabulary: int = VOCABULARY, hidden: int = 32, layers: int = 2) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        initializer_range=0.08,
    )
    return Qwen3ForCausalLM(config)


def save(model: Qwen3ForCausalLM, path: Path) -> str:
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def tokens(text: str) -> tuple[int, ...]:
    return tuple(FIRST_LETTER + LETTERS.index(letter) for letter in text)


def prompts(domain: str, texts: Sequence[str]) -> list[Prompt]:
    return [Prompt(f"{domain}/{index}", domain, tokens(text)) for index, text in enumerate(texts)]


class Recorder:
    """Takes what would go to metrics.jsonl."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []
        self.events: list[dict[str, object]] = []

    def event(self, name: str, /, **fields: object) -> None:
        self.events.append({"event": name} | fields)

    def write(self, stage: str, step: int, steps: int, metrics: dict[str, float]) -> None:
        self.lines.append({"step": step, "steps": steps} | metrics)


@dataclass
class Running:
    """A sample that the local service works on."""

    request: GroupRequest
    number: int
    wait: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: str = ""

    def completion(self) -> Completion:
        return Completion(self.token_ids, self.logprobs, self.finish_reason, version_spans(self.versions))


class LocalClient:
    """A rollout service whose engine is a copy of the model in this process; a step samples a token of each request.

    While the trainer learns, which is before every publication, it makes `steps_between` steps. After its first token a
    group waits `delays[id]` steps.
    """

    def __init__(self, model: PreTrainedModel, steps_between: int = 0, delays: Mapping[str, int] | None = None) -> None:
        self.model = model.eval()
        self.steps_between = steps_between
        self.delays = delays or {}
        self.version: int | None = None
        self.versions: list[int] = []
        self.batches: list[list[GroupRequest]] = []
        """What was submitted, call by call."""
        self.running: list[Running] = []
        self.groups: dict[str, list[Running]] = {}
        self.finished: dict[str, FinishedGroup] = {}
        self.consumed: list[str] = []
        self.acknowledged: list[str] = []
        self.forgotten: list[str] = []
        """Prefixes."""
        self.cancelled: list[str] = []

    @property
    def asked(self) -> list[GroupRequest]:
        return [request for batch in self.batches for request in batch]

    def weight_version(self) -> int | None:
        return self.version

    def publish(self, weights: Mapping[str, np.ndarray], version: int) -> float:
        for _ in range(self.steps_between):
            self.step()
        self.model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
        assert self.version is None or version > self.version
        self.version = version
        self.versions.append(version)
        return 0.001

    def submit(self, groups: Sequence[GroupRequest]) -> None:
        self.batches.append(list(groups))
        for request in groups:
            assert request.id not in self.groups
            samples = [Running(request, j, self.delays.get(request.id, 0)) for j in range(request.sampling.n)]
            self.groups[request.id] = samples
            self.running += samples

    def collect(
        self, count: int, ids: Sequence[str] | None = None, timeout: float | None = None
    ) -> list[FinishedGroup]:
        while len(self.finished) < count if ids is None else not set(ids) <= set(self.finished):
            assert self.running
            self.step()
        return [self.finished.pop(name) for name in ([*self.finished][:count] if ids is None else ids)]

    def consume(self, ids: Sequence[str]) -> None:
        self.consumed += ids

    def acknowledge(self, ids: Sequence[str]) -> None:
        self.acknowledged += ids

    def forget_under(self, prefix: str) -> None:
        self.forgotten.append(prefix)

    def cancel(self, ids: Sequence[str]) -> None:
        self.cancelled += ids
        self.running = [sample for sample in self.running if sample.request.id not in ids]

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        ids = [f"generate/{len(self.batches)}/{row}" for row in range(len(prompts))]
        self.submit([GroupRequest(*row, sampling, index) for index, row in enumerate(zip(ids, prompts, strict=True))])
        return [group.completions for group in self.collect(len(ids), ids)]

    def answer(self, request: GroupRequest, completions: list[Completion]) -> FinishedGroup:
        """What is handed out for a finished group."""
        return FinishedGroup(request, completions)

    @torch.no_grad()
    def step(self) -> None:
        """Sample one token of each request."""
        ready = [sample for sample in self.running if not sample.token_ids or not sample.wait]
        for sample in self.running:
            sample.wait -= bool(sample.token_ids and sample.wait)
        for sample, logits_V in zip(ready, self._next_logits(ready), strict=True):
            settings = sample.request.sampling
            place = (settings.seed, sample.request.index, sample.number, len(sample.token_ids))
            generator = torch.Generator().manual_seed(derive_seed(*place))
            logps_V = torch.log_softmax(logits_V / settings.temperature, dim=-1)
            token = int(torch.multinomial(logps_V.exp(), 1, generator=generator))
            sample.token_ids.append(token)
            sample.logprobs.append(logps_V[token].item())
            sample.versions.append(self.version or 0)
            if token == EOS or len(sample.token_ids) == settings.max_tokens:
                sample.finish_reason = "stop" if token == EOS else "length"
        self.running = [sample for sample in self.running if not sample.finish_reason]
        for name, samples in list(self.groups.items()):
            if all(sample.finish_reason for sample in samples):
                request = self.groups.pop(name)[0].request
                self.finished[name] = self.answer(request, [sample.completion() for sample in samples])

    def _next_logits(self, samples: Sequence[Running]) -> Tensor:
        if not samples:
            return torch.zeros(0)
        rows = [[*sample.request.prompt_ids, *sample.token_ids] for sample in samples]
        width = max(map(len, rows))
        tokens_BT = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return self.model(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).logits[:, -1]
