"""The character tokenizer: its vocabulary, its round trips, its files."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.layout import SPECIAL_TOKENS
from posttrain.data.tokenizer import CHARACTERS, build_character_tokenizer, load_tokenizer
from posttrain.errors import BadInput

TOKENIZER = build_character_tokenizer()


def test_special_tokens_have_the_first_ids_in_the_order_of_v4():
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (0, 1, 2)
    assert TOKENIZER.convert_ids_to_tokens([0, 1, 2, 3, 4, 5, 6, 7]) == [
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜▁pad▁｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<think>",
        "</think>",
        "｜DSML｜",
    ]


def test_the_vocabulary_is_full_and_a_multiple_of_64():
    assert len(TOKENIZER) == 128
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(128))


def test_every_character_is_one_token_and_nothing_is_added():
    for character in CHARACTERS:
        assert len(TOKENIZER(character)["input_ids"]) == 1, character
    assert len(TOKENIZER("two words\n")["input_ids"]) == 10


@settings(deadline=None)
@given(st.text(alphabet=CHARACTERS, max_size=60))
def test_text_survives_the_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_an_unknown_character_becomes_the_unknown_token():
    assert TOKENIZER.encode("aé") == [TOKENIZER.encode("a")[0], TOKENIZER.unk_token_id]


def test_batches_are_padded_on_the_left():
    batch = TOKENIZER(["abc", "a"], padding=True)
    assert batch["input_ids"][1][:2] == [2, 2]
    assert batch["attention_mask"][1] == [0, 0, 1]


@pytest.mark.parametrize("model_type", [None, "deepseek_v4", "qwen3", "llama"])
def test_saving_and_loading_changes_nothing_whatever_model_lies_beside_it(tmp_path, model_type):
    TOKENIZER.save_pretrained(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = load_tokenizer(tmp_path)
    text = "<｜begin▁of▁sentence｜>a\n<｜User｜>1 + 2</think> é<think>"
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.decode(loaded.encode(text)) == TOKENIZER.decode(TOKENIZER.encode(text))
    assert loaded.special_tokens_map == TOKENIZER.special_tokens_map
    assert loaded.chat_template == TOKENIZER.chat_template
    assert loaded.padding_side == "left"


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path):
    tokenizer = build_character_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id == 1


def test_a_tokenizer_without_an_end_token_is_bad_input(tmp_path):
    tokenizer = build_character_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="no eos_token"):
        load_tokenizer(tmp_path)


def test_a_directory_without_a_tokenizer_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="no tokenizer could be loaded from"):
        load_tokenizer(tmp_path)
