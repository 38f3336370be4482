"""`posttrain serve` as a user runs it: a process of its own, asked by the real `openai` client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from openai import BadRequestError, OpenAI

from posttrain.data.encoding import encode_prompt
from posttrain.data.tokenizer import build_character_tokenizer
from posttrain.data.v4 import Mode
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, make_config
from rollouts.serving import server_command
from tests.v4_models import randomise

START_SECONDS = 240.0
QUESTION = [{"role": "user", "content": "3+5="}]
ADD = {
    "name": "add",
    "description": "Adds.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"what": {"type": "string", "enum": ["3+5"]}},
        "required": ["what"],
    },
}


@dataclass
class Server:
    process: subprocess.Popen
    client: OpenAI
    model: DeepseekV4ForCausalLM
    checkpoint: Path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    checkpoint = tmp_path_factory.mktemp("served") / "tiny"
    tokenizer = build_character_tokenizer()
    torch.manual_seed(3)
    fields = {"preset": "tiny", "max_position_embeddings": 4096, "num_hidden_layers": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = DeepseekV4ForCausalLM(make_config(fields | ids, vocab_size=len(tokenizer))).eval()
    randomise(model)
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    port = free_port()
    command = [sys.executable, "-m", "posttrain", "serve", str(checkpoint), "--port", str(port)]
    options = ["--max-model-len", "4096", "--kv-cache-memory-bytes", str(256 << 20), "--max-num-seqs", "8"]
    log = checkpoint.parent / "server.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen([*command, *options], stdout=file, stderr=subprocess.STDOUT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(process, address, log)
        yield Server(process, OpenAI(base_url=f"{address}/v1", api_key="none"), model, checkpoint)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def wait_for(process: subprocess.Popen, address: str, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"{address}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError(f"no answer after {START_SECONDS:.0f} s: {log.read_text()[-3000:]}")


def test_the_weights_served_are_the_checkpoints(server: Server) -> None:
    prompt = encode_prompt(build_character_tokenizer(), QUESTION, mode="chat")
    answer = server.client.completions.create(
        model="tiny", prompt=prompt, max_tokens=12, temperature=1, seed=5, logprobs=0
    )
    extra = {"return_token_ids": True}
    again = server.client.completions.create(
        model="tiny", prompt=prompt, max_tokens=12, temperature=1, seed=5, logprobs=0, extra_body=extra
    )
    assert answer.choices[0].text == again.choices[0].text
    sampled = again.choices[0].token_ids
    tokens = torch.tensor([prompt + sampled])
    with torch.no_grad():
        expected = server.model(tokens).logits.float().log_softmax(-1)[0, len(prompt) - 1 : -1]
    expected = expected.gather(1, torch.tensor(sampled).unsqueeze(1)).squeeze(1)
    found = torch.tensor(again.choices[0].logprobs.token_logprobs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("asked", "mode"),
    [({}, "chat"), ({"reasoning_effort": "low"}, "thinking"), ({"reasoning_effort": "high"}, "thinking_max")],
)
def test_chat_reads_the_prompt_that_training_writes(server: Server, asked: dict[str, str], mode: Mode) -> None:
    answer = server.client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=4, temperature=0, extra_body={"return_token_ids": True}, **asked
    )
    assert answer.prompt_token_ids == encode_prompt(build_character_tokenizer(), QUESTION, mode=mode)


def test_a_tool_call_in_dsml_comes_out_as_openais(server: Server) -> None:
    answer = server.client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        tools=[{"type": "function", "function": ADD}],
        tool_choice={"type": "function", "function": {"name": "add"}},
        max_tokens=400,
        temperature=0,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "add"
    assert call.function.arguments == '{"what": "3+5"}'


def test_a_stream_says_what_the_whole_answer_says(server: Server) -> None:
    how = {"model": "tiny", "messages": QUESTION, "max_tokens": 16, "temperature": 1, "seed": 9}
    whole = server.client.chat.completions.create(**how).choices[0].message.content
    parts = [part.choices[0].delta.content or "" for part in server.client.chat.completions.create(**how, stream=True)]
    assert "".join(parts) == whole


def test_a_prompt_that_is_too_long_is_refused(server: Server) -> None:
    with pytest.raises(BadRequestError, match="maximum context length"):
        server.client.completions.create(model="tiny", prompt=[7] * 5000, max_tokens=1)


def test_it_ends_with_everything_it_started(server: Server) -> None:
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    assert len(family) > 2
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


@pytest.mark.parametrize(
    ("missing", "says"), [("config.json", "config.json is missing"), ("tokenizer.json", "no tokenizer")]
)
def test_what_is_no_checkpoint_is_bad_input(missing: str, says: str, tmp_path: Path) -> None:
    for name in {"config.json", "tokenizer.json"} - {missing}:
        (tmp_path / name).write_text("{}")
    command = [sys.executable, "-m", "posttrain", "serve", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert says in done.stderr


def test_other_models_run_on_vllms_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    command = server_command(tmp_path, tmp_path / "model", "127.0.0.1", 8000)
    assert command[command.index("--model") + 1] == str(tmp_path)
    assert "--load-format" not in command
