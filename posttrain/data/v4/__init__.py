"""DeepSeek-V4's chat format: conversations to marked text and back. Strings only, no tokenizer and no heavy library.

Source: the encoder published with the weights (`encoding/encoding_dsv4.py`, MIT) and its README; the V4 report
(arXiv 2606.19348) for the three efforts, interleaved thinking and quick instructions. `docs/encoding.md` describes it.
"""

from posttrain.data.v4.conversation import parse_conversation
from posttrain.data.v4.messages import Message, Mode, ToolCall, check_conversation, with_tools
from posttrain.data.v4.parse import FormatError, ParsedTurn, parse_turn
from posttrain.data.v4.render import continuation_parts, conversation_parts
from posttrain.data.v4.text import Part, seal, seal_text, unseal

__all__ = [
    "FormatError",
    "Message",
    "Mode",
    "ParsedTurn",
    "Part",
    "ToolCall",
    "check_conversation",
    "continuation_parts",
    "conversation_parts",
    "parse_conversation",
    "parse_turn",
    "seal",
    "seal_text",
    "unseal",
    "with_tools",
]
