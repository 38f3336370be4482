"""Training rows: what carries loss, what TRL makes of them, and the check that problems fit a recipe."""

from __future__ import annotations

import datasets
import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from posttrain.data import DomainData, load_domain
from posttrain.data.encoding import encode_prompt
from posttrain.data.problems import make_problem
from posttrain.data.rows import check_problems, prompt_rows, sft_rows
from posttrain.data.tokenizer import build_character_tokenizer
from posttrain.errors import BadInput
from posttrain.recipe.domains import DomainConfig
from posttrain.recipe.schema import Recipe

TOKENIZER = build_character_tokenizer()
SUM = {
    "reasoning_gym": "chain_sum",
    "params": {"min_terms": 2, "max_terms": 2, "max_digits": 2},
    "prompt": "{metadata[expression]}=",
}


def problem(prompt: str, answer: str):
    return make_problem("d", [{"role": "user", "content": prompt}], answer, {}, None)


def test_only_the_answer_and_its_end_token_carry_loss():
    (row,) = sft_rows(TOKENIZER, [problem("1+2=", "3")])
    assert TOKENIZER.decode(row["input_ids"]) == (
        "<｜begin▁of▁sentence｜><｜User｜>1+2=<｜Assistant｜></think>3<｜end▁of▁sentence｜>"
    )
    learned = [label for label in row["labels"] if label != -100]
    assert TOKENIZER.decode(learned) == "3<｜end▁of▁sentence｜>"
    assert row["labels"][-2:] == row["input_ids"][-2:] and len(row["labels"]) == len(row["input_ids"])


def test_prompt_rows_carry_tokens_identity_and_domain():
    example = problem("1+2=", "3")
    (row,) = prompt_rows(TOKENIZER, [example])
    assert row == {
        "prompt": [{"role": "user", "content": "1+2="}],
        "prompt_ids": encode_prompt(TOKENIZER, example.messages),
        "problem_id": example.id,
        "domain": "d",
    }


@pytest.mark.parametrize("skip", [False, True])
def test_trl_takes_the_rows_as_they_are(tmp_path, skip):
    rows = sft_rows(TOKENIZER, [problem("1+2=", "3"), problem("10+20=", "30")])
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, pad_token_id=2, **shape))
    arguments = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, max_length=64, report_to="none",
        per_device_train_batch_size=2, dataset_kwargs={"skip_prepare_dataset": skip},
    )  # fmt: skip
    trainer = SFTTrainer(model, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=TOKENIZER)
    batch = next(iter(trainer.get_train_dataloader()))
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        ids, labels = ids[mask.bool()].tolist(), labels[mask.bool()].tolist()
        assert {"input_ids": ids, "labels": labels} in rows
    assert batch["labels"][batch["attention_mask"] == 0].tolist() == [-100, -100, -100]


def recipe(**changes) -> Recipe:
    base = {
        "name": "r",
        "model": {"config": "tiny"},
        "domains": {"sums": DomainConfig(source=SUM, train=200, selection=8, holdout=8, max_new_tokens=8)},
        "stages": {"experts": {"per_domain": [{"kind": "sft"}]}},
        "evaluation": [{"holdout": {"n": 8}}],
    }
    return Recipe(**{**base, **changes})


def test_problems_that_fit_pass():
    domains = {"sums": load_domain("sums", recipe().domains["sums"], 0)}
    check_problems(recipe(), TOKENIZER, domains)


@pytest.mark.parametrize(
    ("changes", "example", "complaint"),
    [
        ({}, problem("1+2=", "3" * 8), "domains.sums.max_new_tokens is 8; the longest reference answer has 9 tokens"),
        ({}, problem("é", "3"), "domains.sums: the tokenizer does not know every character of the problem 'é'"),
        ({}, problem("e", "é"), "does not know every character of the problem 'e' with the answer 'é'"),
        ({}, problem("1" * 245, "3"), "rollout.max_model_len is 256; domains.sums needs 257"),
        (
            {"stages": {"experts": {"per_domain": [{"kind": "sft", "max_length": 16}]}}},
            problem("1" * 12, "2"),
            "stages.experts.per_domain: max_length is 16; the longest example of domains.sums has 18 tokens",
        ),
        (
            {"stages": {"base": {"max_length": 16}, "experts": {"per_domain": [{"kind": "grpo"}]}}},
            problem("1" * 12, "2"),
            "stages.base: max_length is 16",
        ),
    ],
)
def test_problems_that_do_not_fit_are_bad_input(changes, example, complaint):
    domains = {"sums": DomainData(train=[problem("1+1=", "2")], selection=[problem("1+3=", "4")], holdout=[example])}
    with pytest.raises(BadInput, match=complaint.replace(".", r"\.")):
        check_problems(recipe(**changes), TOKENIZER, domains)
