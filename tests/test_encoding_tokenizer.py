"""The format on V4's own tokenizer: the ids are those of the reference encoder's text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.encoding import decode_conversation, decode_turn, encode_conversation, encode_text, has_v4_layout
from posttrain.data.layout import DSML, EOS, SPECIAL_TOKENS
from tests.encoding_kit import as_kept, conversations, load_reference, modes, real_tokenizer, reference_text

plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<｜"), max_size=12)


@pytest.fixture(scope="module")
def tokenizer():
    return real_tokenizer()


@pytest.fixture(scope="module")
def reference():
    return load_reference()


def test_it_is_v4s_vocabulary(tokenizer):
    """The ids that V4's model card and its config give."""
    assert has_v4_layout(tokenizer) and len(tokenizer) == 129_280
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    assert len(set(ids.values())) == len(SPECIAL_TOKENS)
    assert (ids["<｜begin▁of▁sentence｜>"], ids[EOS], ids["<think>"], ids["</think>"], ids[DSML]) == (
        *(0, 1, 128821, 128822, 128825),
    )


@settings(max_examples=150, deadline=None)
@given(messages=conversations(plain_text), mode=modes)
def test_the_ids_are_those_of_the_reference_text(tokenizer, reference, messages, mode):
    text = reference_text(reference, messages, mode)
    assert encode_conversation(tokenizer, messages, mode).token_ids == tokenizer.encode(text, add_special_tokens=False)


@settings(max_examples=100, deadline=None)
@given(messages=conversations(plain_text), mode=modes)
def test_ids_there_and_back(tokenizer, messages, mode):
    kept = as_kept(messages, mode)
    if len(kept) == len(messages):
        assert decode_conversation(tokenizer, encode_conversation(tokenizer, messages, mode).token_ids)[0] == kept


@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.sampled_from([*SPECIAL_TOKENS, "<｜fim▁hole｜>", "<"]) | plain_text, max_size=5).map("".join))
def test_no_text_becomes_a_special_token(tokenizer, text):
    ids = encode_text(tokenizer, text)
    added = tokenizer.added_tokens_decoder
    assert not [token for token in ids if token in added and "｜" in added[token].content]
    assert tokenizer.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 128_900), max_size=40), mode=modes)
def test_any_ids_can_be_read_as_a_turn(tokenizer, ids, mode):
    assert (decode_turn(tokenizer, ids, mode).phase == "ended") == (1 in ids)


def test_a_character_that_was_cut_in_its_bytes_is_shown_as_one(tokenizer):
    ids = encode_text(tokenizer, "𒀀")
    assert len(ids) > 1
    assert decode_turn(tokenizer, ids[:-1]).content.strip("\ufffd") == ""
