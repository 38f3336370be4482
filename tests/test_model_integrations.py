"""Our V4 in other people's hands: PEFT, lm-eval, TRL's packing and generation, all offline."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import GenerationConfig

from posttrain.data.tokenizer import build_character_tokenizer
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, make_config
from posttrain.trainers.trl_seam import SFTConfig, SupervisedTrainer

TOKENIZER = build_character_tokenizer()
TARGETS = ["wq_a", "wq_b", "wkv", "wo_b"]
BOUND = 1e-5


def v4(seed: int = 0) -> DeepseekV4ForCausalLM:
    torch.manual_seed(seed)
    ids = {"bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    model = DeepseekV4ForCausalLM(
        make_config("tiny", vocab_size=len(TOKENIZER), pad_token_id=TOKENIZER.pad_token_id, **ids)
    )
    return model.eval()


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(10, len(TOKENIZER), (batch, length), generator=torch.Generator().manual_seed(length))


def with_adapter(model: DeepseekV4ForCausalLM) -> PeftModel:
    """LoRA whose both halves are random, so that it does something."""
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    return adapted


def test_lora_alone_is_trained() -> None:
    adapted = with_adapter(v4()).train()
    batch = tokens(3, 40)
    adapted(input_ids=batch, labels=batch).loss.backward()
    gradients = {name: parameter.grad for name, parameter in adapted.named_parameters()}
    for name, gradient in gradients.items():
        if "lora_" in name and ".indexer." not in name:
            assert gradient is not None, name
            assert gradient.abs().max() > 0, name
        else:
            assert gradient is None, name
    assert any("compressor.wkv.lora_A" in name for name in gradients)
    assert not any("lm_head" in name and "lora_" in name for name in gradients)


def test_a_merged_adapter_is_the_adapter() -> None:
    batch = tokens(2, 40)
    adapted = with_adapter(v4())
    plain, expected = v4()(batch).logits, adapted(input_ids=batch).logits
    assert (expected - plain).abs().max() > 0.01
    merged = adapted.merge_and_unload()
    assert type(merged) is DeepseekV4ForCausalLM
    assert (merged(batch).logits - expected).abs().max() <= BOUND


def test_a_saved_adapter_is_the_adapter(tmp_path: Path) -> None:
    batch = tokens(2, 30)
    adapted = with_adapter(v4())
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(v4(), tmp_path)
    assert torch.equal(loaded(input_ids=batch).logits, adapted(input_ids=batch).logits)


def test_generate_samples_and_stops_at_the_end_token() -> None:
    model, prompt = v4(), tokens(4, 12)
    assert model.can_generate()
    torch.manual_seed(1)
    config = GenerationConfig(
        max_new_tokens=9,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=list(range(0, len(TOKENIZER), 3)),
    )
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    for row in out[:, 12:].tolist():
        ends = [place for place, token in enumerate(row) if token % 3 == 0 and token != TOKENIZER.pad_token_id]
        assert len(row) == 9 or ends
        assert all(token == TOKENIZER.pad_token_id for token in row[ends[0] + 1 :] if ends)


def test_beams_and_greedy_agree_where_they_must() -> None:
    """Beam search reorders rows between steps; with one beam it is greedy."""
    model, prompt = v4(), tokens(2, 10)
    fixed: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": TOKENIZER.pad_token_id,
    }
    greedy, beams = model.generate(prompt, **fixed), model.generate(prompt, num_beams=4, **fixed)

    def log_probability(rows: Tensor) -> Tensor:
        scores = torch.log_softmax(model(rows).logits[:, 9:-1], -1)
        return scores.gather(2, rows[:, 10:].unsqueeze(2)).sum((1, 2))

    assert (log_probability(beams) >= log_probability(greedy) - BOUND).all()


def write_lines(file: Path, rows: list[dict[str, str]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def task(name: str, file: str, **fields: Any) -> dict[str, Any]:
    source = {"data_files": {"test": file}, "cache_dir": f"{file}.cache"}
    return {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test", **fields}


def test_lm_eval_scores_choices_and_generations(tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = v4()
    questions = ["1+2=", "what is the capital of France?", "a"]
    choices = write_lines(tmp_path / "choices.jsonl", [{"question": question} for question in questions])
    generations = write_lines(tmp_path / "generations.jsonl", [{"question": q, "answer": "x"} for q in questions])
    tasks = [
        task(
            "choices",
            choices,
            output_type="multiple_choice",
            doc_to_text="{{question}}",
            doc_to_target=0,
            doc_to_choice=["yes", "no", "perhaps"],
            metric_list=[{"metric": "acc"}],
        ),
        task(
            "generations",
            generations,
            output_type="generate_until",
            doc_to_text="{{question}}",
            doc_to_target="{{answer}}",
            generation_kwargs={"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
            metric_list=[{"metric": "exact_match"}],
        ),
    ]
    harness = HFLM(pretrained=model, tokenizer=copy.deepcopy(TOKENIZER), batch_size=3, device="cpu")
    found = lm_eval.simple_evaluate(model=harness, tasks=tasks, bootstrap_iters=0, log_samples=True)
    assert found["results"]["choices"]["sample_len"] == 3
    for sample in found["samples"]["choices"]:
        for choice, (response, _) in zip(["yes", "no", "perhaps"], sample["filtered_resps"], strict=True):
            assert float(response) == pytest.approx(own_score(model, sample["doc"]["question"], f" {choice}"), abs=1e-4)
    for sample in found["samples"]["generations"]:
        assert sample["filtered_resps"][0] == own_answer(model, sample["doc"]["question"], 6)


def own_score(model: DeepseekV4ForCausalLM, question: str, choice: str) -> float:
    prompt, answer = (TOKENIZER(text, add_special_tokens=False).input_ids for text in (question, choice))
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1], -1)
    return scores.gather(1, torch.tensor(answer).unsqueeze(1)).sum().item()


def own_answer(model: DeepseekV4ForCausalLM, question: str, count: int) -> str:
    row = torch.tensor([TOKENIZER(question, add_special_tokens=False).input_ids])
    out = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=count, do_sample=False)
    return TOKENIZER.decode(out[0, row.shape[1] :], skip_special_tokens=True).split("\n")[0]


LENGTHS = [5, 17, 3, 24, 9, 1, 30, 12]


def sft(model: DeepseekV4ForCausalLM, directory: Path, **settings: Any) -> tuple[SupervisedTrainer, list[dict]]:
    """TRL's trainer on rows of those lengths, all of them in one step without any update; and the batches it saw."""
    rows = [tokens(1, length)[0].tolist() for length in LENGTHS]
    fixed: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "router_aux_loss_coef": 0.0,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    trainer = SupervisedTrainer(
        model=model,
        args=SFTConfig(**{**fixed, **settings}),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=copy.deepcopy(TOKENIZER),
    )
    seen: list[dict] = []
    step = trainer.compute_loss

    def watched(model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        seen.append(dict(inputs))
        return step(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    return trainer, seen


def mean_loss(model: DeepseekV4ForCausalLM) -> float:
    """Each row alone."""
    total, count = 0.0, 0
    with torch.no_grad():
        for length in LENGTHS:
            row = tokens(1, length)
            scores = torch.log_softmax(model(row).logits[0, :-1], -1)
            total -= scores.gather(1, row[0, 1:].unsqueeze(1)).sum().item()
            count += length - 1
    return total / count


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": len(LENGTHS)},
        {"per_device_train_batch_size": len(LENGTHS), "padding_free": True, "max_length": None},
        {"per_device_train_batch_size": 4, "packing": True, "max_length": 40},
    ],
    ids=["padded", "padding-free", "packed"],
)
def test_trl_lays_rows_out_in_any_way_for_the_same_loss(settings: dict[str, Any], tmp_path: Path) -> None:
    trainer, seen = sft(v4(), tmp_path, **settings)
    assert len(seen) == 1, "all rows in one batch"
    assert ("attention_mask" in seen[0]) == (len(settings) == 1)
    loss = trainer.state.log_history[0]["loss"]
    assert loss == pytest.approx(mean_loss(v4()), abs=1e-4)


def test_packed_rows_give_the_gradients_of_padded_ones(tmp_path: Path) -> None:
    padded, packed = (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 4, "packing": True, "max_length": 40},
    )
    one, other = gradients(padded, tmp_path), gradients(packed, tmp_path)
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert (gradient - other[name]).abs().max() <= BOUND * gradient.abs().max().clamp(min=1), name


def gradients(settings: dict[str, Any], directory: Path) -> dict[str, Tensor]:
    """Of every parameter that gets one, caught before the trainer forgets them."""
    model, found = v4(), {}
    for name, parameter in model.named_parameters():

        def keep(parameter: Tensor, name: str = name) -> None:
            found[name] = parameter.grad.clone()

        parameter.register_post_accumulate_grad_hook(keep)
    sft(model, directory, **settings)
    return found
