"""A tiny language model, its tokenizer, and a sampler in the process: what the trainers' tests share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from posttrain.trainers.jobs import Prompt
from rollouts.types import Completion, Sampling

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

    def write(self, stage: str, step: int, steps: int, metrics: dict[str, float]) -> None:
        self.lines.append({"step": step, "steps": steps} | metrics)


class LocalClient:
    """A rollout client whose engine is a copy of the model in this process, sampling one token at a time."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self.model = model.eval()
        self.version: int | None = None
        self.calls: list[tuple[list[list[int]], Sampling]] = []

    def weight_version(self) -> int | None:
        return self.version

    def publish(self, weights: Mapping[str, np.ndarray], version: int) -> float:
        self.model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
        self.version = version
        return 0.001

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        self.calls.append((prompts, sampling))
        generator = torch.Generator().manual_seed(sampling.seed)
        rows = [prompt for prompt in prompts for _ in range(sampling.n)]
        width = max(map(len, rows))
        tokens_BT = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        samples = [Completion([], [], "length", self.version) for _ in rows]
        for _ in range(sampling.max_tokens):
            logits_BV = self.model(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).logits[:, -1]
            logps_BV = torch.log_softmax(logits_BV / sampling.temperature, dim=-1)
            chosen_B = torch.multinomial(logps_BV.exp(), 1, generator=generator)[:, 0]
            for sample, token, logps_V in zip(samples, chosen_B.tolist(), logps_BV, strict=True):
                if sample.finish_reason == "length":
                    sample.token_ids.append(token)
                    sample.logprobs.append(logps_V[token].item())
                    sample.finish_reason = "stop" if token == EOS else "length"
            tokens_BT = torch.cat([tokens_BT, chosen_B[:, None]], dim=1)
            mask_BT = torch.cat([mask_BT, torch.ones_like(chosen_B)[:, None]], dim=1)
        return [samples[i : i + sampling.n] for i in range(0, len(samples), sampling.n)]
