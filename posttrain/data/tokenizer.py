"""The project's character tokenizer, and loading of any other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.data.layout import BOS, CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS
from posttrain.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

UNKNOWN = "<unk>"
CHARACTERS = "\n\t" + "".join(map(chr, range(0x20, 0x7F))) + "｜▁"
"""Printable ASCII, and the two other characters that the special tokens are spelled with: text that looks like a
special token can then be written as plain characters."""
MULTIPLE = 64
"""The vocabulary is filled up with reserved tokens to a multiple of this."""


def character_vocabulary() -> dict[str, int]:
    """Token → id: the special tokens, the unknown token, the characters, reserved tokens. 128 entries."""
    tokens = [*SPECIAL_TOKENS, UNKNOWN, *CHARACTERS]
    reserved = -len(tokens) % MULTIPLE
    tokens += [f"<｜reserved_{index}｜>" for index in range(reserved)]
    return {token: index for index, token in enumerate(tokens)}


def build_character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character, V4's special tokens, and V4's chat layout as its template.

    It adds nothing by itself: no begin-of-sentence token unless the text has one. Characters it does not know
    become `<unk>`. Pads on the left.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = character_vocabulary()
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in (BOS, EOS, PAD)],
        padding_side="left",
        truncation_side="left",
        clean_up_tokenization_spaces=False,
        add_bos_token=False,
        add_eos_token=False,
        model_max_length=1 << 20,
        chat_template=CHAT_TEMPLATE,
    )


def load_tokenizer(path_or_id: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a directory or the hub; it has an end token and a padding token afterwards.

    Raises:
        BadInput: nothing loadable there, or a tokenizer without an end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path_or_id))
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(
            f"no tokenizer could be loaded from {str(path_or_id)!r} (a directory or a hub id): {error}"
        ) from error
    if len(tokenizer) <= len(
        tokenizer.all_special_tokens
    ):  # what transformers makes of a directory with nothing to load
        raise BadInput(f"no tokenizer could be loaded from {str(path_or_id)!r}: there are no tokenizer files in it")
    if tokenizer.eos_token_id is None:
        raise BadInput(f"the tokenizer {str(path_or_id)!r} has no eos_token; answers could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer
