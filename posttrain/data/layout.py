"""The special tokens of DeepSeek-V4's chat format. Strings only: importing this costs nothing.

Source: the encoder published with the V4 weights (`encoding_dsv4.py`); the V4 report describes the same layout.
"""

from __future__ import annotations

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
"""Opens every tag of the tool-call markup: `<｜DSML｜invoke name="...">`."""
LATEST_REMINDER = "<｜latest_reminder｜>"
TASKS = ("<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>", "<｜title｜>", "<｜read_url｜>")
"""Quick-instruction tasks, each triggered by one token."""

LAYOUT_TOKENS = (BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END)
"""What a conversation without tools needs. A tokenizer that has them all gets the V4 layout."""

SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, THINK_START, THINK_END, DSML, LATEST_REMINDER, *TASKS)
"""All, in the order of their ids in the project's character tokenizer: bos 0 and eos 1 as in the V4 vocabulary."""

CHAT_TEMPLATE = (
    "{{ '" + BOS + "' }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{- message['content'] + '" + EOS + "' }}"
    "{%- elif message['role'] == 'user' %}"
    # Neighbouring user messages become one turn.
    "{{- '\n\n' if loop.previtem is defined and loop.previtem['role'] == 'user' else '" + USER + "' }}"
    "{{- message['content'] }}"
    "{%- elif message['role'] == 'system' %}"
    "{{- message['content'] }}"
    "{%- else %}{{ raise_exception('the roles are system, user and assistant, not ' + message['role']) }}"
    "{%- endif %}"
    "{%- if message['role'] != 'assistant' and (add_generation_prompt if loop.last"
    " else loop.nextitem['role'] == 'assistant') %}"
    "{{- '" + ASSISTANT + THINK_END + "' }}"
    "{%- endif %}"
    "{%- endfor %}"
)
"""The same layout as `posttrain.data.encoding` in chat mode, for libraries that render by template."""
