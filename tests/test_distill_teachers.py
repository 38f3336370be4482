"""Teachers from a store, in a budget of memory, tried before they teach; their states on the way."""

from __future__ import annotations

import hashlib
import mmap
import threading
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.canary import Canary, vocabulary_digest
from distill.checkpoint_store import MANIFEST, local_checkpoint
from distill.model_cache import Device, Held, ModelCache, bytes_in_memory, moved_together, tensors_of
from distill.prefill import batches
from distill.store import DamagedBlock, HiddenBlock, joined
from distill.teacher import TeacherWorker
from posttrain.errors import BadInput
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, make_config
from tests.test_distill import KEPT, SEQUENCES, states_of
from tests.trainers_kit import EOS, PAD, VOCABULARY, save, tiny_model

CANARY = Canary(prompts=SEQUENCES, vocabulary=VOCABULARY, eos=[EOS])
GIB = 1 << 30


def confident(path: Path, seed: int = 1) -> str:
    """A model whose predictions are far from uniform."""
    model = tiny_model(seed)
    model.lm_head.weight.data *= 30
    return save(model, path)


def with_manifest(path: str) -> str:
    files = sorted(file for file in Path(path).iterdir() if file.name != MANIFEST)
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (Path(path) / MANIFEST).write_text("".join(lines))
    return path


def tiny_v4(seed: int, precision: str | None = None) -> DeepseekV4ForCausalLM:
    torch.manual_seed(seed)
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    config = make_config("tiny", **tokens)
    if precision:
        config.precision = precision
    return DeepseekV4ForCausalLM(config)


def test_a_checkpoint_behind_a_url_is_fetched_once_and_whole(tmp_path: Path) -> None:
    local = with_manifest(save(tiny_model(0), tmp_path / "here"))
    memory = fsspec.filesystem("memory")
    memory.put(local, "/store/expert", recursive=True)
    cache = tmp_path / "cache"
    fetched = local_checkpoint("memory://store/expert", cache)
    assert {file.name for file in fetched.iterdir()} == {file.name for file in Path(local).iterdir()}
    teacher = TeacherWorker("hf", GIB, cache=cache)
    assert torch.equal(states_of(teacher, "memory://store/expert"), states_of(teacher, local))
    stamp = (fetched / "config.json").stat().st_ino
    assert local_checkpoint("memory://store/expert", cache) == fetched
    assert (fetched / "config.json").stat().st_ino == stamp


def test_a_file_that_differs_from_the_manifest_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    local = with_manifest(save(tiny_model(0), tmp_path / "here"))
    with (Path(local) / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    memory, cache = fsspec.filesystem("memory"), tmp_path / "cache"
    memory.put(local, "/store/damaged", recursive=True)
    with pytest.raises(BadInput, match=r"memory://store/damaged: model.safetensors is damaged: its SHA-256 is"):
        local_checkpoint("memory://store/damaged", cache)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]
    with pytest.raises(BadInput, match=r"model.safetensors is damaged"):
        TeacherWorker("hf", GIB).head(local)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{'0' * 64}  model-2.safetensors\n", r"model-2.safetensors is missing; SHA256SUMS has it"),
        (f"{'0' * 64}  ../../secret\n", r"SHA256SUMS, line 1: expected a SHA-256 checksum and a file"),
        ("nonsense\n", r"SHA256SUMS, line 1: expected a SHA-256 checksum and a file"),
    ],
)
def test_a_manifest_is_held_against_what_is_there(line: str, message: str, tmp_path: Path) -> None:
    local = save(tiny_model(0), tmp_path / "here")
    (Path(local) / MANIFEST).write_text(line)
    with pytest.raises(BadInput, match=message):
        TeacherWorker("hf", GIB).head(local)


def test_a_store_without_the_checkpoint_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"memory://store/nothing is not a model checkpoint: there are no files"):
        local_checkpoint("memory://store/nothing", tmp_path)
    with pytest.raises(BadInput, match=r"nosuch://x cannot be fetched: ValueError"):
        local_checkpoint("nosuch://x", tmp_path)


def test_v4_teachers_take_packed_sequences_and_give_the_same_bits(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    model = tiny_v4(0)
    model.save_pretrained(tmp_path / "v4")
    teacher = TeacherWorker("deepseek_v4", GIB)
    together = states_of(teacher, str(tmp_path / "v4"))
    expected = []
    with torch.no_grad():
        for sequence, kept in zip(SEQUENCES, KEPT, strict=True):
            expected.append(model.model(input_ids=torch.tensor([sequence])).last_hidden_state[0, -kept - 1 : -1])
    assert torch.equal(together, torch.cat(expected))
    monkeypatch.setattr("distill.prefill.TOKENS_PER_FORWARD", 20)
    assert torch.equal(states_of(teacher, str(tmp_path / "v4")), together)


def test_packed_batches_are_filled_by_their_tokens_padded_ones_by_their_width(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("distill.prefill.TOKENS_PER_FORWARD", 10)
    assert batches([6, 2, 2, 9, 1], packed=True) == [[3], [0, 1, 2], [4]]
    assert batches([6, 2, 2, 9, 1], packed=False) == [[3], [0], [1, 2, 4]]


def test_states_come_in_the_teachers_precision_unless_asked_otherwise(tmp_path: Path) -> None:
    tiny_v4(0, "bf16").save_pretrained(tmp_path / "bf16")
    tiny_v4(0).save_pretrained(tmp_path / "fp32")
    teacher = TeacherWorker("deepseek_v4", GIB)
    low, high = str(tmp_path / "bf16"), str(tmp_path / "fp32")
    assert states_of(teacher, low).dtype is teacher.head(low).tensor().dtype is torch.bfloat16
    assert states_of(teacher, high).dtype is teacher.head(high).tensor().dtype is torch.float32
    rounded = states_of(teacher, high, dtype="bfloat16")
    assert torch.equal(rounded, states_of(teacher, high).bfloat16())


def test_the_budget_counts_what_a_model_takes_in_memory(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        tiny_v4(0, precision).save_pretrained(tmp_path / precision)
        with ModelCache("deepseek_v4", 1, tmp_path).using(str(tmp_path / precision)) as (held, _, loaded):
            expected = bytes_in_memory("deepseek_v4", held.path)
            assert loaded == held.nbytes
            assert expected == pytest.approx(held.nbytes, rel=0.1)  # norms and biases of bf16 models are fp32


def test_the_next_teacher_is_loaded_while_one_computes_if_both_fit(tmp_path: Path) -> None:
    paths = [save(tiny_model(seed), tmp_path / str(seed)) for seed in range(2)]
    size = bytes_in_memory("hf", Path(paths[0]))
    for budget, both in ((3 * size, True), (size, False)):
        models, loaded = ModelCache("hf", budget, tmp_path), threading.Event()

        def second(models: ModelCache = models, loaded: threading.Event = loaded) -> None:
            with models.using(paths[1]):
                loaded.set()

        with models.using(paths[0]):
            other = threading.Thread(target=second)
            other.start()
            assert loaded.wait(60 if both else 0.3) is both  # one in use is never dropped
            assert models.names() == (paths if both else paths[:1])
        other.join(60)
        assert loaded.is_set()
        assert models.names() == (paths if both else paths[1:])


def test_a_model_that_leaves_the_device_is_what_it_was(tmp_path: Path) -> None:
    held = [Held(tiny_model(seed), tmp_path, 0) for seed in range(2)]

    def places() -> list[list[int]]:
        return [[parameter.data_ptr() for parameter in one.model.parameters()] for one in held]

    before = places()
    device = Device("cpu:0")  # not "cpu": weights are copied as to any device
    assert device.place(held[0]) == sum(tensor.nbytes for tensor in tensors_of(held[0].model))
    assert device.place(held[0]) == 0
    assert not set(places()[0]) & set(before[0])
    assert all(map(torch.equal, held[0].model.parameters(), tiny_model(0).parameters()))
    device.place(held[1])
    assert places()[0] == before[0]  # one at a time
    device.forget(held[0])
    assert places()[0] == before[0] and places()[1] != before[1]
    device.forget(held[1])
    assert places() == before


def test_a_model_in_one_piece_of_memory_is_what_it_was() -> None:
    model, same = tiny_model(0), tiny_model(0)
    pages = moved_together(model)
    begin, end = pages.data_ptr(), pages.data_ptr() + pages.nbytes
    assert begin % mmap.PAGESIZE == 0
    for moved, tensor in zip(tensors_of(model), tensors_of(same), strict=True):
        assert torch.equal(moved, tensor) and moved.stride() == tensor.stride()
        assert begin <= moved.data_ptr() and moved.data_ptr() + moved.nbytes <= end
    tokens = torch.arange(5, 12)[None]
    assert torch.equal(model(tokens).logits, same(tokens).logits)


def test_a_block_says_what_it_is_and_notices_damage() -> None:
    states_NG = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    block = HiddenBlock.of("t", 0, states_NG)
    assert torch.equal(joined("t", [3], [block]), states_NG)
    damaged = replace(block, states=replace(block.states, bits=block.states.bits + 1))
    with pytest.raises(DamagedBlock, match="sample 0 by t were damaged on the way"):
        joined("t", [3], [damaged])
    for teacher, kept in (("u", [3]), ("t", [2])):
        with pytest.raises(DamagedBlock, match="were asked for"):
            joined(teacher, kept, [block])
    with pytest.raises(DamagedBlock, match="were asked for"):
        joined("t", [3], [replace(block, tap="before the final norm")])


def test_a_teacher_in_order_passes(tmp_path: Path) -> None:
    path = confident(tmp_path / "t")
    canary = replace(CANARY, tokens=vocabulary_digest(Path(path)))
    assert canary.tokens is not None
    evidence = TeacherWorker("hf", GIB).examine(path, canary, True)
    assert evidence.entropy < 0.9 * evidence.uniform


def test_random_weights_are_refused_of_teachers_from_elsewhere(tmp_path: Path) -> None:
    path = save(tiny_model(0), tmp_path / "t")
    worker = TeacherWorker("hf", GIB)
    with pytest.raises(BadInput, match=r"looks untrained: .* is 3\.\d+ nats, that of guessing 3.761"):
        worker.examine(path, CANARY, True)
    worker.examine(path, CANARY, False)


def test_another_vocabulary_tokenizer_or_end_is_refused(tmp_path: Path) -> None:
    path = confident(tmp_path / "t")
    worker = TeacherWorker("hf", GIB)
    with pytest.raises(BadInput, match=r"vocabulary of 43 tokens, the student one of 44"):
        worker.examine(path, replace(CANARY, vocabulary=44), False)
    with pytest.raises(BadInput, match=r"ends with token \[1\] \(eos_token_id\), the student with \[7, 8\]"):
        worker.examine(path, replace(CANARY, eos=[7, 8]), False)
    described = (tmp_path / "t" / "tokenizer.json").read_text()
    (tmp_path / "t" / "tokenizer.json").write_text(described.replace('"a": 2', '"a": 3').replace('"b": 3', '"b": 2'))
    with pytest.raises(BadInput, match="has another tokenizer: as many tokens"):
        worker.examine(path, replace(CANARY, tokens=vocabulary_digest(Path(confident(tmp_path / "u")))), True)
    worker.examine(path, replace(CANARY, eos=[EOS, 8]), True)


def test_damaged_weights_are_refused_with_their_name(tmp_path: Path) -> None:
    path = confident(tmp_path / "t")
    weights = load_file(Path(path) / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, Path(path) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"the parameter model.layers.1.mlp.up_proj.weight has values that are not"):
        TeacherWorker("hf", GIB).examine(path, CANARY, False)


@pytest.mark.parametrize("family", ["hf", "deepseek_v4"])
def test_a_missing_or_cut_shard_is_refused(family: str, tmp_path: Path) -> None:
    if family == "hf":
        tiny_model(0).save_pretrained(tmp_path / "t", max_shard_size="20KB")
    else:
        tiny_v4(0).save_pretrained(tmp_path / "t")
    shard = sorted((tmp_path / "t").glob("*.safetensors"))[-1]
    data = shard.read_bytes()
    for damage in (lambda: shard.write_bytes(data[: len(data) // 2]), shard.unlink):
        damage()
        with pytest.raises(BadInput, match=str(tmp_path / "t")):
            TeacherWorker(family, GIB).examine(str(tmp_path / "t"), CANARY, False)


def test_a_tensor_that_the_files_lack_is_not_made_up(tmp_path: Path) -> None:
    path = Path(save(tiny_model(0), tmp_path / "t")) / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"t: its files lack 1 of the model's tensors: model.layers.0.mlp.up_proj"):
        TeacherWorker("hf", GIB).head(str(path.parent))
