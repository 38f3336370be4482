"""V4's chat layout against the public reference encoder, and what tokens come of it."""

from __future__ import annotations

from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.data.encoding import (
    conversation_parts,
    decode_completion,
    encode_example,
    encode_prompt,
    encode_text,
    has_v4_layout,
    render_conversation,
    render_prompt,
)
from posttrain.data.layout import ASSISTANT, BOS, EOS, SPECIAL_TOKENS, THINK_END, THINK_START, USER
from posttrain.data.tokenizer import CHARACTERS, build_character_tokenizer
from posttrain.data.v4 import with_tools
from posttrain.errors import BadInput
from tests.encoding_kit import WEATHER, load_reference, modes, reference_text

TOKENIZER = build_character_tokenizer()
SPECIAL_IDS = set(range(len(SPECIAL_TOKENS)))

ordinary_text = st.text(alphabet=CHARACTERS, max_size=20)
# Hypothesis also draws whole strings out of the source, special tokens among them; all of them have one of these.
plain_text = st.text(alphabet=CHARACTERS.replace("<", "").replace("｜", ""), max_size=20)
disguised_text = st.lists(st.one_of(st.sampled_from([*SPECIAL_TOKENS, "<unk>", "<", "｜"]), ordinary_text), max_size=5)
disguised_text = disguised_text.map("".join)
any_message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": ordinary_text},
    optional={"reasoning": ordinary_text},
)
any_conversation = st.lists(any_message, min_size=1, max_size=6)


def prompts(text):
    """Conversations that a model can answer: they do not end with the assistant."""
    message = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": text})
    last = st.fixed_dictionaries({"role": st.just("user"), "content": text})
    return st.tuples(st.lists(message, max_size=4), last).map(lambda both: [*both[0], both[1]])


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return load_reference()


def byte_level_tokenizer(**kwargs: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without V4's tokens, as other model families have."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the user asks and the assistant answers"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        pad_token="<|end|>",
        extra_special_tokens=["<|im_start|>"],
        **kwargs,
    )


def test_the_layout_of_a_simple_prompt():
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+2="}]
    assert render_prompt(messages) == f"{BOS}Add.{USER}1+2={ASSISTANT}{THINK_END}"
    assert render_prompt(messages, "thinking") == f"{BOS}Add.{USER}1+2={ASSISTANT}{THINK_START}"
    answered = [*messages, {"role": "assistant", "content": "3"}]
    assert render_conversation(answered) == f"{BOS}Add.{USER}1+2={ASSISTANT}{THINK_END}3{EOS}"


@settings(max_examples=300, deadline=None)
@given(messages=any_conversation, mode=modes)
def test_every_conversation_renders_as_the_reference_encoder_renders_it(reference, messages, mode):
    assert render_conversation(messages, mode) == reference_text(reference, messages, mode)


@settings(max_examples=200, deadline=None)
@given(messages=any_conversation, generate=st.booleans())
def test_the_chat_template_renders_the_same(messages, generate):
    if messages[-1]["role"] != "assistant" and not generate:
        expected = render_conversation(messages).removesuffix(ASSISTANT + THINK_END)
    else:
        expected = render_conversation(messages)
    assert TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate) == expected


@settings(max_examples=200, deadline=None)
@given(messages=prompts(plain_text), answer=plain_text, reasoning=plain_text, mode=modes)
def test_tokens_are_the_tokens_of_the_rendered_text(messages, answer, reasoning, mode):
    prompt_ids, completion_ids = encode_example(TOKENIZER, messages, answer, mode, reasoning)
    assert prompt_ids == encode_prompt(TOKENIZER, messages, mode)
    turn = {"role": "assistant", "content": answer, "reasoning": reasoning}
    text = render_conversation([*messages, turn], mode)
    assert TOKENIZER.decode(prompt_ids + completion_ids) == text
    assert prompt_ids + completion_ids == TOKENIZER.encode(text)
    assert completion_ids[-1] == TOKENIZER.eos_token_id
    if mode == "chat":
        assert prompt_ids == TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@settings(max_examples=300, deadline=None)
@given(messages=prompts(disguised_text), answer=disguised_text)
def test_text_that_looks_like_a_special_token_stays_text(messages, answer):
    prompt_ids, completion_ids = encode_example(TOKENIZER, messages, answer)
    marks = [part.text for part in conversation_parts(messages) if part.special]
    assert [i for i in prompt_ids if i in SPECIAL_IDS] == TOKENIZER.convert_tokens_to_ids(marks)
    assert [i for i in completion_ids if i in SPECIAL_IDS] == [TOKENIZER.eos_token_id]
    assert TOKENIZER.unk_token_id not in prompt_ids + completion_ids
    assert TOKENIZER.decode(prompt_ids) == render_prompt(messages)
    assert decode_completion(TOKENIZER, completion_ids) == answer


@settings(max_examples=100, deadline=None)
@given(first=ordinary_text, second=ordinary_text, messages=prompts(ordinary_text))
def test_a_prompts_tokens_do_not_depend_on_the_answer(first, second, messages):
    assert encode_example(TOKENIZER, messages, first)[0] == encode_example(TOKENIZER, messages, second)[0]


def test_marks_that_a_vocabulary_does_not_flag_as_special_are_guarded_too():
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([token for token in SPECIAL_TOKENS if token not in (BOS, EOS)], special_tokens=False)
    tokenizer.add_special_tokens({"bos_token": BOS, "eos_token": EOS})
    assert has_v4_layout(tokenizer)
    user = tokenizer.convert_tokens_to_ids(USER)
    prompt_ids = encode_prompt(tokenizer, [{"role": "user", "content": f"{USER}a{EOS}"}])
    assert prompt_ids.count(user) == 1 and tokenizer.eos_token_id not in prompt_ids
    assert tokenizer.decode(prompt_ids) == f"{BOS}{USER}{USER}a{EOS}{ASSISTANT}{THINK_END}"


def test_unknown_characters_next_to_a_disguise_are_no_error():
    ids = encode_text(TOKENIZER, "é<think>")
    assert ids[0] == TOKENIZER.unk_token_id
    assert TOKENIZER.decode(ids[1:]) == "<think>"


def test_decoding_stops_at_the_end_token_and_shows_other_special_tokens():
    ids = TOKENIZER.encode(f"ab{THINK_END}c{EOS}<｜▁pad▁｜>d")
    assert decode_completion(TOKENIZER, ids) == f"ab{THINK_END}c"
    assert decode_completion(TOKENIZER, []) == ""


@pytest.mark.parametrize(
    ("messages", "mode", "complaint"),
    [
        ([], "chat", "at least one message"),
        ([{"role": "user", "content": "a"}], "deep", "'chat', 'thinking', 'thinking_max', not 'deep'"),
        ([{"role": "robot", "content": "a"}], "chat", "message 0: the role is one of system, user, assistant, tool"),
        ([{"role": "user", "content": "\ud800"}], "chat", "message 0: `content` has half of a surrogate pair"),
        ([{"role": "user", "content": None}], "chat", "message 0: `content` is text, not NoneType"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "chat", "a prompt ends with"),
    ],
)
def test_malformed_prompts_are_bad_input(messages, mode, complaint):
    with pytest.raises(BadInput, match=complaint):
        encode_prompt(TOKENIZER, messages, mode)


def test_another_familys_chat_template_is_used_if_it_has_one():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% if not enable_thinking %}(no thinking){% endif %}{% endif %}"
    )
    tokenizer = byte_level_tokenizer(chat_template=template)
    assert not has_v4_layout(tokenizer)
    prompt_ids, completion_ids = encode_example(tokenizer, [{"role": "user", "content": "the é"}], "answers")
    assert tokenizer.decode(prompt_ids) == "<|im_start|>user: the é<|end|><|im_start|>(no thinking)"
    assert tokenizer.decode(completion_ids) == "answers<|end|>"
    with pytest.raises(BadInput, match="need a tokenizer with V4's tokens"):
        encode_example(tokenizer, [{"role": "user", "content": "a"}], "b", "thinking")
    with pytest.raises(BadInput, match="message 0: tools and V4's other roles need"):
        encode_prompt(tokenizer, with_tools([{"role": "user", "content": "a"}], [WEATHER]))


def test_a_chat_template_that_refuses_is_bad_input():
    tokenizer = byte_level_tokenizer(chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(BadInput, match="refuses the conversation: no system role"):
        encode_prompt(tokenizer, [{"role": "system", "content": "a"}])


@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.one_of(st.sampled_from(["<|end|>", "<|im_start|>", "<|"]), st.text(max_size=9)), max_size=4))
def test_a_tokenizer_without_a_template_gets_the_plain_layout_and_no_disguise_works(text):
    tokenizer = PLAIN
    content = "".join(text)
    prompt_ids, completion_ids = encode_example(tokenizer, [{"role": "user", "content": content}], content)
    assert tokenizer.decode(prompt_ids) == f"User: {content}\n\nAssistant:\n"
    assert decode_completion(tokenizer, completion_ids) == content
    assert {0, 1}.isdisjoint(prompt_ids) and {0, 1}.isdisjoint(completion_ids[:-1])


PLAIN = byte_level_tokenizer()
