"""Weights on their way: packing, checksums, the store, and what stands in a model afterwards. No engine, no Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.errors import RunFailed
from rollouts.loading import NativeWeights
from rollouts.publishing import PARTS, FilePart, WeightStore
from rollouts.weights import PackedTensor, WeightUpdate, check_coverage, checksum_of, combined_checksum


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 4)])
def test_a_packed_tensor_comes_back_bit_by_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    packed = PackedTensor.of(tensor)
    packed.bits.flags.writeable = False  # as Ray's object store hands it out
    back = packed.tensor()
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert torch.equal(back.float(), tensor.float())
    assert PackedTensor.of(back).checksum() == PackedTensor.of(tensor).checksum()


def test_views_and_arrays_pack_like_their_contents() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    assert PackedTensor.of(tensor.T).checksum() == PackedTensor.of(tensor.T.contiguous()).checksum()
    assert PackedTensor.of(tensor.numpy().T).checksum() == PackedTensor.of(tensor.T).checksum()


def test_a_checksum_sees_every_bit_the_shape_and_the_type() -> None:
    tensor = torch.zeros(4, 6)
    changed = tensor.clone()
    changed[3, 5] = -0.0
    others = [changed, tensor.reshape(6, 4), tensor.int(), torch.zeros(4, 5)]
    sums = {PackedTensor.of(value).checksum() for value in [tensor, *others]}
    assert len(sums) == 5


def test_the_combined_checksum_ignores_order_and_sees_names() -> None:
    assert combined_checksum({"a": "1", "b": "2"}) == combined_checksum({"b": "2", "a": "1"})
    assert combined_checksum({"a": "1", "b": "2"}) != combined_checksum({"a": "2", "b": "1"})


def test_an_update_with_a_changed_or_lost_tensor_is_refused() -> None:
    weights = {"a": torch.ones(3), "b": torch.ones(2)}
    update = WeightUpdate.pack(weights, 1)
    assert update.checked_tensors().keys() == weights.keys()
    update.tensors["b"].bits[1] = 2
    with pytest.raises(RunFailed, match="damaged on the way: checksums of b"):
        update.checked_tensors()
    del update.tensors["b"]
    with pytest.raises(RunFailed, match="b arrived without tensor or checksum"):
        update.checked_tensors()


def test_coverage_names_what_is_missing_unknown_or_misshapen() -> None:
    expected = {"a": (2,), "b": (3,), "tied": (2,)}
    check_coverage(expected, {"tied"}, {"a": (2,), "b": (3,)})
    with pytest.raises(RunFailed) as error:
        check_coverage(expected, set(), {"a": (5,), "c": (1,)})
    for words in ("missing: b, tied", "unknown to the engine: c", "a has shape [5], the engine's has [2]"):
        assert words in str(error.value)


class Plain(torch.nn.Module):
    """Stands for our own model in the engine: parameters and a buffer, loaded by name."""

    def __init__(self, forgetful: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("bias", torch.zeros(3, dtype=torch.bfloat16))
        self.register_buffer("table", torch.zeros(3), persistent=False)
        self.forgetful = forgetful

    def load_weights(self, pairs: object) -> None:
        own = self.state_dict()
        for name, tensor in pairs:  # type: ignore[attr-defined]
            if not (self.forgetful and name == "bias"):
                own[name].copy_(tensor)


def checksums_of(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: checksum_of(tensor) for name, tensor in weights.items()}


def flip_bit(tensor: torch.Tensor, element: int, bit: int) -> None:
    """As memory does when it fails."""
    words = tensor.view(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    words[element] ^= 1 << bit


def test_a_native_model_is_compared_tensor_by_tensor_after_loading() -> None:
    weights = {"weight": torch.randn(2, 3), "bias": torch.randn(3)}
    model = Plain()
    standing = NativeWeights(lambda function: function(model))
    assert standing.load(weights, checksums_of(weights)).verified == 2
    assert torch.equal(model.weight, weights["weight"])
    assert torch.equal(model.bias, weights["bias"].bfloat16())
    forgetful = NativeWeights(lambda function: function(Plain(forgetful=True)))
    with pytest.raises(RunFailed, match="not the ones it was sent: bias"):
        forgetful.load(weights, checksums_of(weights))
    with pytest.raises(RunFailed, match="missing: bias"):
        standing.load({"weight": weights["weight"]}, checksums_of({"weight": weights["weight"]}))


def test_an_engine_lacks_what_changed_and_everything_after_a_failure() -> None:
    model = Plain()
    standing = NativeWeights(lambda function: function(model))
    first = {"weight": torch.randn(2, 3), "bias": torch.randn(3)}
    assert standing.lacking(checksums_of(first)) == {"weight", "bias"}
    standing.load(first, checksums_of(first))
    second = {**first, "bias": torch.randn(3)}
    assert standing.lacking(checksums_of(second)) == {"bias"}
    assert standing.load({"bias": second["bias"]}, checksums_of(second)).verified == 2
    assert torch.equal(model.weight, first["weight"]) and torch.equal(model.bias, second["bias"].bfloat16())
    model.forgetful = True
    with pytest.raises(RunFailed, match="bias"):
        standing.load({"bias": first["bias"]}, checksums_of(first))
    assert standing.lacking(checksums_of(first)) == {"weight", "bias"}
    with pytest.raises(RunFailed, match="not complete: weight"):
        standing.load({"bias": first["bias"]}, checksums_of(first))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_bit_that_falls_over_in_memory_is_found_by_the_audit_and_by_the_next_update(name: str) -> None:
    model = Plain()
    standing = NativeWeights(lambda function: function(model))
    weights = {"weight": torch.randn(2, 3), "bias": torch.randn(3)}
    standing.load(weights, checksums_of(weights))
    assert standing.audit() == []
    flip_bit(model.state_dict()[name], 2, 0)
    assert standing.audit() == [name]
    with pytest.raises(RunFailed, match=name):  # although nothing is sent
        standing.load({}, checksums_of(weights))


# --- the store ---------------------------------------------------------------------------------------------------


def weights_of(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "experts": torch.randn(4, 3, 5),
        "sink": torch.randn(6),
        "matrix": torch.randn(7, 2).bfloat16(),
        "table": torch.randint(0, 4, (9, 2)),
        "scale": torch.randint(0, 255, (3,), dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert checksums_of(found) == checksums_of(expected)


def test_only_what_changed_is_packed_and_a_newcomer_finds_all_of_it(tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "weights", shared_memory=False)
    assert store.current is None and store.checksums == {}
    first = weights_of(1)
    store.put(WeightUpdate.pack(first, 1, store.checksums))
    second = {**first, "sink": first["sink"] + 1, "matrix": first["matrix"] * 2}
    update = WeightUpdate.pack(second, 2, store.checksums)
    assert update.tensors.keys() == {"sink", "matrix"}
    published = store.put(update)
    assert store.current is published and published.version == 2
    assert published.checksums == checksums_of(second)
    assert_same(published.fetch(second), second)
    assert_same(published.fetch({"sink", "table"}), {"sink": second["sink"], "table": first["table"]})
    same = store.put(WeightUpdate.pack(second, 3, store.checksums))
    assert_same(same.fetch(second), second)


def test_the_store_refuses_old_versions_and_tensors_that_it_would_have_to_guess(tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "weights", shared_memory=False)
    store.put(WeightUpdate.pack(weights_of(1), 5))
    with pytest.raises(RunFailed, match="version 5 after version 5: versions must grow"):
        store.put(WeightUpdate.pack(weights_of(2), 5))
    foreign = checksums_of(weights_of(3))
    with pytest.raises(RunFailed, match="left out but are not held: experts, matrix, scale, sink, table"):
        store.put(WeightUpdate.pack(weights_of(3), 6, foreign))
    assert store.current is not None and store.current.version == 5


@pytest.mark.parametrize(("name", "element", "bit"), [("experts", 59, 0), ("sink", 0, 31)])
def test_one_flipped_bit_in_an_update_is_refused_and_the_version_before_stays(
    tmp_path: Path, name: str, element: int, bit: int
) -> None:
    store = WeightStore(tmp_path / "weights", shared_memory=False)
    store.put(WeightUpdate.pack(weights_of(1), 1))
    update = WeightUpdate.pack(weights_of(2), 2)
    flip_bit(update.tensors[name].tensor(), element, bit)
    with pytest.raises(RunFailed, match=f"version 2 were damaged on the way: checksums of {name}"):
        store.put(update)
    assert store.current is not None
    assert_same(store.current.fetch(weights_of(1)), weights_of(1))


def test_one_flipped_bit_in_a_file_is_refused_by_whoever_reads_it(tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "weights", shared_memory=False)
    published = store.put(WeightUpdate.pack(weights_of(1), 1))
    (part,) = published.parts
    assert isinstance(part, FilePart)
    whole = part.file.read_bytes()
    part.file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
    with pytest.raises(RunFailed, match="damaged on the way"):
        published.fetch(published.checksums)
    part.file.write_bytes(whole[:-3])
    with pytest.raises(RunFailed, match="cannot be read from"):
        published.fetch(published.checksums)
    part.file.unlink()
    with pytest.raises(RunFailed, match="cannot be read from"):
        published.fetch(published.checksums)


def test_files_go_when_neither_this_version_nor_the_one_before_needs_them(tmp_path: Path) -> None:
    directory = tmp_path / "weights"
    (directory / "99").mkdir(parents=True)
    store = WeightStore(directory, shared_memory=False)
    kept, weights = [], weights_of(0)
    for version in range(1, 30):
        weights = {**weights, ["experts", "sink", "matrix"][version % 3]: weights_of(version)["experts"]}
        published = store.put(WeightUpdate.pack(weights, version, store.checksums))
        assert len(published.parts) <= PARTS
        assert_same(published.fetch(weights), weights)
        kept.append(len(list(directory.iterdir())))
    assert max(kept) <= 2 * PARTS and not (directory / "99").exists()
    for version in range(30, 33):
        store.put(WeightUpdate.pack(weights_of(version), version, store.checksums))
    assert sorted(path.name for path in directory.iterdir()) == ["31", "32"]


def test_a_full_disk_leaves_the_version_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = WeightStore(tmp_path / "weights", shared_memory=False)
    store.put(WeightUpdate.pack(weights_of(1), 1))

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(RunFailed, match=r"version 2 cannot be written to .*No space left"):
        store.put(WeightUpdate.pack(weights_of(2), 2))
    monkeypatch.undo()
    assert store.current is not None
    assert_same(store.current.fetch(weights_of(1)), weights_of(1))
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["1"]
    store.put(WeightUpdate.pack(weights_of(2), 2))


def test_numpy_arrays_are_accepted_as_weights() -> None:
    update = WeightUpdate.pack({"a": np.ones((2, 2), dtype=np.float32)}, 3)
    assert torch.equal(update.checked_tensors()["a"], torch.ones(2, 2))
