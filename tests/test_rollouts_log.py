"""The rollout log: nothing that was written is lost, and nothing that is read is wrong."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.errors import RunFailed
from rollouts.log import LogKeeper, LogWriter, format, next_incarnation, recover
from rollouts.log.format import SegmentName, segments
from tests.log_kit import MadeRun, made_log, new_tokens, request_of, token_at

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MadeRun]:
    directory = tmp_path_factory.mktemp("whole")
    return directory, made_log(directory, seed=1)


def copied(source: Path) -> tempfile.TemporaryDirectory[str]:
    holder = tempfile.TemporaryDirectory()
    shutil.copytree(source, holder.name, dirs_exist_ok=True)
    return holder


def test_what_many_workers_wrote_in_many_segments_comes_back_whole(whole: tuple[Path, MadeRun]) -> None:
    directory, run = whole
    recovered = recover(directory)
    run.check_whole(recovered)
    assert not recovered.damage and not recovered.torn
    assert recovered.weights == {version: f"checksum {version}" for version in range(1, run.version + 1)}
    names = segments(directory)
    assert len([name for name in names if name.worker == "w0"]) > 2
    resumed = [name for name, got in recovered.requests.items() if got.attempt == 1]
    assert resumed and any(len(recovered.requests[name].spans) > 1 for name in resumed)


@pytest.mark.parametrize("seed", range(20, 30))
def test_random_runs_come_back_whole(tmp_path: Path, seed: int) -> None:
    run = made_log(tmp_path, seed, steps=40, segment_bytes=500 + 300 * (seed % 7))
    run.check_whole(recover(tmp_path))


def test_an_empty_or_absent_directory_is_an_empty_log(tmp_path: Path) -> None:
    assert recover(tmp_path / "nothing").requests == {}
    assert recover(tmp_path).requests == {}
    (tmp_path / "notes.log").write_text("not a segment")
    assert recover(tmp_path).requests == {}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_gives_a_prefix_of_the_truth(whole: tuple[Path, MadeRun], data: st.DataObject) -> None:
    directory, run = whole
    with copied(directory) as name:
        victim = data.draw(st.sampled_from(segments(directory)))
        path = Path(name) / str(victim)
        size = data.draw(st.integers(0, path.stat().st_size))
        os.truncate(path, size)
        recovered = recover(name)
        run.check_prefix(recovered)
        again = recover(name)
        assert again.requests == recovered.requests


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_byte_anywhere_gives_a_prefix_of_the_truth(whole: tuple[Path, MadeRun], data: st.DataObject) -> None:
    directory, run = whole
    with copied(directory) as name:
        victim = data.draw(st.sampled_from(segments(directory)))
        path = Path(name) / str(victim)
        content = bytearray(path.read_bytes())
        offset = data.draw(st.integers(0, len(content) - 1))
        content[offset] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        recovered = recover(name)
        run.check_prefix(recovered)
        # It was seen, and at the right place.
        found = [place for place in recovered.damage + recovered.torn if place.file == str(path)]
        assert any(place.offset <= offset < place.offset + place.length for place in found)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_lost_files_and_garbage_in_the_middle_give_a_prefix_of_the_truth(
    whole: tuple[Path, MadeRun], data: st.DataObject
) -> None:
    directory, run = whole
    with copied(directory) as name:
        names = segments(directory)
        for victim in data.draw(st.lists(st.sampled_from(names), max_size=2, unique=True)):
            (Path(name) / str(victim)).unlink()
        left = data.draw(st.sampled_from(segments(Path(name))))
        content = (Path(name) / str(left)).read_bytes()
        begin = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(begin, len(content)))
        garbage = data.draw(st.one_of(st.binary(max_size=64), st.just(content[:begin]), st.just(bytes(end - begin))))
        (Path(name) / str(left)).write_bytes(content[:begin] + garbage + content[end:])
        run.check_prefix(recover(name))


def test_a_torn_tail_is_cut_and_everything_before_it_kept(tmp_path: Path) -> None:
    with LogWriter(tmp_path, "w", 0) as writer:
        writer.open(request_of("a"))
        for position in range(5):
            writer.append([new_tokens("a", position, 1, 1)])
    path = tmp_path / "w-0-000000.log"
    os.truncate(path, path.stat().st_size - 3)
    recovered = recover(tmp_path)
    assert len(recovered.requests["a"].token_ids) == 4
    assert not recovered.damage
    assert [place.file for place in recovered.torn] == [str(path)]


def test_damage_in_the_middle_is_reported_with_file_and_offset_and_other_requests_go_on(tmp_path: Path) -> None:
    with LogWriter(tmp_path, "w", 0) as writer:
        for name in "ab":
            writer.open(request_of(name))
        writer.append([new_tokens("a", 0, 3, 1)])
        offset = (tmp_path / "w-0-000000.log").stat().st_size
        writer.append([new_tokens("a", 3, 2, 1, "stop")])
        writer.append([new_tokens("b", 0, 4, 1, "stop")])
    path = tmp_path / "w-0-000000.log"
    content = bytearray(path.read_bytes())
    content[offset + format.FRAME.size + 9] ^= 4
    path.write_bytes(content)
    recovered = recover(tmp_path)
    assert [(place.file, place.offset) for place in recovered.damage] == [(str(path), offset)]
    assert f"{path}: damaged records at byte {offset}" in str(recovered.damage[0])
    assert len(recovered.requests["a"].token_ids) == 3
    assert recovered.requests["a"].finish_reason is None
    assert recovered.requests["b"].finish_reason == "stop"


def test_a_record_of_another_file_is_not_believed(tmp_path: Path) -> None:
    made_log(tmp_path, seed=5)
    (tmp_path / "w0-0-000001.log").rename(tmp_path / "w2-0-000000.log")
    recovered = recover(tmp_path)
    assert not any(name.startswith("w2") for name in recovered.requests)
    assert any("w2-0-000000.log" in place.file for place in recovered.torn)


def test_another_format_version_is_refused_by_name(tmp_path: Path) -> None:
    made_log(tmp_path, seed=5)
    path = tmp_path / "w0-0-000000.log"
    start = format.HEADER.pack(format.HEADER_MAGIC, 9, 0, 0)[:-4]
    path.write_bytes(start + format.zlib.crc32(start).to_bytes(4, "little") + path.read_bytes()[16:])
    with pytest.raises(RunFailed, match=r"w0-0-000000\.log: written in version 9 of the log's format"):
        recover(tmp_path)


def write_attempt(
    directory: Path, worker: str, begin: int, count: int, attempt: int, of: str = "a", version: int = 1
) -> None:
    """An attempt at request `a` whose tokens are those of request `of`."""
    tokens = [token_at("a", position)[0] for position in range(begin)]
    request = request_of("a")
    opened = type(request)(request.id, request.prompt_ids, tokens, request.sampling, request.seed, attempt)
    with LogWriter(directory, worker, 0) as writer:
        writer.open(opened)
        new = new_tokens(of, begin, count, version)
        new.id = "a"
        writer.append([new])


def test_overlapping_attempts_that_agree_keep_the_longest(tmp_path: Path) -> None:
    write_attempt(tmp_path, "w0", 0, 10, attempt=0)
    write_attempt(tmp_path, "w1", 4, 3, attempt=1, version=2)
    got = recover(tmp_path).requests["a"]
    assert got.token_ids == [token_at("a", position)[0] for position in range(10)]
    assert got.versions == [1] * 4 + [2] * 3 + [1] * 3
    assert got.attempt == 1


def test_of_attempts_that_disagree_the_later_one_wins(tmp_path: Path) -> None:
    write_attempt(tmp_path, "w9", 0, 10, attempt=0)
    write_attempt(tmp_path, "w1", 4, 3, attempt=1, of="b")
    got = recover(tmp_path).requests["a"]
    want = [token_at("a", position)[0] for position in range(4)] + [token_at("b", at)[0] for at in range(4, 7)]
    assert got.token_ids == want


def test_an_attempt_whose_beginning_is_lost_does_not_count(tmp_path: Path) -> None:
    write_attempt(tmp_path, "w0", 0, 3, attempt=0)
    write_attempt(tmp_path, "w1", 5, 3, attempt=1)
    recovered = recover(tmp_path)
    assert recovered.requests["a"].token_ids == [token_at("a", position)[0] for position in range(3)]
    assert "a continues at token 5, but the tokens before it are lost" in str(recovered.damage[0])


def test_fields_come_back_for_every_token(tmp_path: Path) -> None:
    routes = [bytes([position] * (position % 3)) for position in range(6)]
    with LogWriter(tmp_path, "w", 0) as writer:
        writer.open(request_of("a"))
        writer.open(request_of("plain"))
        for begin in (0, 2):
            step = [new_tokens("a", begin, 2, 1), new_tokens("plain", begin, 2, 1)]
            writer.append(step, {"a": {"routes": routes[begin : begin + 2], "mask": [b"m"] * 2}})
        writer.append([new_tokens("a", 4, 2, 1, "stop")], {"a": {"routes": routes[4:]}})
    recovered = recover(tmp_path).requests
    assert recovered["a"].fields == {"routes": routes, "mask": [b"m"] * 4 + [b""] * 2}
    assert recovered["a"].finish_reason == "stop"
    assert recovered["plain"].fields == {}
    assert len(recovered["plain"].token_ids) == 4


def test_cancelled_requests_say_so(tmp_path: Path) -> None:
    with LogWriter(tmp_path, "w", 0) as writer:
        writer.open(request_of("a"))
        writer.append([new_tokens("a", 0, 2, 1)])
        writer.cancel("a")
    assert recover(tmp_path).requests["a"].cancelled


@pytest.mark.parametrize("new", [new_tokens("a", 1, 1, 1), new_tokens("b", 0, 1, 1)], ids=["a gap", "not opened"])
def test_tokens_that_are_not_the_next_ones_are_refused(tmp_path: Path, new: object) -> None:
    with LogWriter(tmp_path, "w", 0) as writer:
        writer.open(request_of("a"))
        with pytest.raises(ValueError, match="the log has"):
            writer.append([new])  # type: ignore[list-item]
        writer.append([new_tokens("a", 0, 1, 1)])
    assert len(recover(tmp_path).requests["a"].token_ids) == 1


def test_an_incarnation_is_used_once(tmp_path: Path) -> None:
    assert next_incarnation(tmp_path / "new", "w") == 0
    LogWriter(tmp_path, "w", 0).close()
    with pytest.raises(RunFailed, match="needs a new incarnation number"):
        LogWriter(tmp_path, "w", 0)
    assert next_incarnation(tmp_path, "w") == 1
    assert next_incarnation(tmp_path, "other") == 0


def test_a_closed_writer_refuses(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, "w", 0)
    writer.close()
    with pytest.raises(RunFailed, match="the rollout log is closed"):
        writer.open(request_of("a"))


# Durability


def test_a_thread_makes_records_durable_and_sync_does_at_once(tmp_path: Path) -> None:
    with LogWriter(tmp_path, "w", 0, sync_seconds=0.01) as writer:
        writer.open(request_of("a"))
        limit = time.monotonic() + 20
        while writer.synced < writer.written and time.monotonic() < limit:
            time.sleep(0.005)
        assert writer.synced == writer.written == 1
    with LogWriter(tmp_path, "w", 1, sync_seconds=1000) as writer:
        writer.open(request_of("a"))
        assert writer.synced == 0
        writer.sync()
        assert writer.synced == 1


def test_a_failed_fsync_ends_the_writer_and_nothing_later_is_called_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = LogWriter(tmp_path, "w", 0, sync_seconds=1000)
    writer.open(request_of("a"))

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", broken)
        with pytest.raises(RunFailed, match=f"{tmp_path}: the rollout log cannot be made durable"):
            writer.sync()
    for call in (writer.sync, lambda: writer.synced, lambda: writer.append([new_tokens("a", 0, 1, 1)])):
        with pytest.raises(RunFailed, match="cannot be made durable"):
            call()
    writer.close()
    assert recover(tmp_path).requests["a"].token_ids == []


def test_a_failed_fsync_of_the_thread_reaches_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LogWriter(tmp_path, "w", 0, sync_seconds=0.01)

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    writer.open(request_of("a"))
    writer._sync_thread.join(20)
    with pytest.raises(RunFailed, match="cannot be made durable"):
        writer.append([new_tokens("a", 0, 1, 1)])
    writer.close()


@pytest.fixture
def small_files() -> Iterator[int]:
    """The kernel lets files grow to so many bytes; the signal that it also sends is ignored, as Python does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield 1000
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def test_a_file_that_cannot_grow_stays_readable(tmp_path: Path, small_files: int) -> None:
    written = 0
    writer = LogWriter(tmp_path, "w", 0)
    writer.open(request_of("a"))
    with pytest.raises(RunFailed, match=f"{tmp_path}: the rollout log cannot be written .* free space"):
        for position in range(1000):
            writer.append([new_tokens("a", position, 1, 1)])
            written += 1
    with pytest.raises(RunFailed, match="cannot be written"):
        writer.append([new_tokens("a", written, 1, 1)])
    writer.close()
    recovered = recover(tmp_path)
    assert written > 10
    assert len(recovered.requests["a"].token_ids) == written
    assert not recovered.torn and not recovered.damage


@pytest.mark.parametrize("room", [0, 1, 15, 40])
def test_a_full_disk_leaves_no_half_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """`room` bytes of the next record still fit, as on a real disk."""
    writer = LogWriter(tmp_path, "w", 0)
    writer.open(request_of("a"))
    writer.append([new_tokens("a", 0, 3, 1)])
    write, left = os.write, [room]

    def full(descriptor: int, data: bytes) -> int:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(descriptor, data[: left[0]])
        left[0] -= done
        return done

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(RunFailed, match=f"{tmp_path}: the rollout log cannot be written .No space left on device"):
            writer.append([new_tokens("a", 3, 3, 1, "stop")])
    writer.close()
    recovered = recover(tmp_path)
    assert len(recovered.requests["a"].token_ids) == 3
    assert recovered.requests["a"].finish_reason is None
    assert not recovered.torn
    with LogWriter(tmp_path, "w", next_incarnation(tmp_path, "w")) as following:
        following.open(request_of("a", 3, attempt=1))
        following.append([new_tokens("a", 3, 3, 1, "stop")])
    assert recover(tmp_path).requests["a"].finish_reason == "stop"


WRITER_PROGRAM = """
import sys
from pathlib import Path
from rollouts.log import LogWriter, recover
from tests.log_kit import MadeRun, new_tokens, request_of
directory, incarnation = Path(sys.argv[1]), int(sys.argv[2])
known = recover(directory).requests
writer = LogWriter(directory, "w", incarnation, segment_bytes=20000, sync_seconds=0.01)
lengths = {}
for name in (f"r{i}" for i in range(8)):
    lengths[name] = len(known[name].token_ids) if name in known else 0
    writer.open(request_of(name, lengths[name], incarnation))
while True:
    writer.append([new_tokens(name, length, 1, incarnation) for name, length in lengths.items()])
    lengths = {name: length + 1 for name, length in lengths.items()}
    print(min(lengths.values()), flush=True)
"""


def test_killed_writers_lose_nothing_that_they_had_reported(tmp_path: Path) -> None:
    """Eight incarnations, each killed at another moment; each continues what the log has of its requests."""
    reported = 0
    for incarnation in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER_PROGRAM, str(tmp_path), str(incarnation)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 * (incarnation % 4) + 0.003 * incarnation)
        process.kill()
        reported = int((process.stdout.read().split() or [str(reported)])[-1])
        process.wait()
        recovered = recover(tmp_path)
        assert not recovered.damage
        for name, got in recovered.requests.items():
            assert len(got.token_ids) >= reported
            truth = [token_at(name, position) for position in range(len(got.token_ids))]
            assert list(zip(got.token_ids, got.logprobs, strict=True)) == truth
            assert got.versions == sorted(got.versions)
    assert reported > 50


# Forgetting


def test_segments_go_when_all_their_requests_are_acknowledged(tmp_path: Path) -> None:
    run = made_log(tmp_path, seed=2, steps=200)
    keeper = LogKeeper(tmp_path)
    before = {path.name: path.stat().st_size for path in tmp_path.glob("*.log")}
    assert keeper.compact().deleted == 0
    keeper.acknowledge(dict.fromkeys(run.finished, 1))
    result = keeper.compact()
    after = {path.name: path.stat().st_size for path in tmp_path.glob("*.log")}
    assert result.deleted == len(before) - len(after) > 0
    assert result.freed_bytes == sum(before.values()) - sum(after.values())
    recovered = recover(tmp_path)
    run.check_prefix(recovered)
    assert recovered.requests.keys() == set(run.unfinished)
    assert all(len(recovered.requests[name].token_ids) == run.lengths[name] for name in run.unfinished)
    keeper.acknowledge(dict.fromkeys(run.unfinished, 1))
    keeper.compact()
    assert segments(tmp_path) == []
    keeper.close()


def test_acknowledgements_survive_the_driver(tmp_path: Path) -> None:
    run = made_log(tmp_path, seed=2)
    keeper = LogKeeper(tmp_path)
    keeper.acknowledge(dict.fromkeys(run.finished, 1))
    keeper.close()
    # The driver died while it wrote the next one.
    with (tmp_path / "acknowledged").open("ab") as file:
        file.write(b"\xa5\xc3half")
    assert recover(tmp_path).requests.keys() == set(run.unfinished)
    keeper = LogKeeper(tmp_path)
    keeper.acknowledge({run.unfinished[0]: 1})
    keeper.close()
    recovered = recover(tmp_path)
    assert recovered.requests.keys() == set(run.unfinished[1:])
    assert not recovered.damage


def test_a_later_attempt_of_an_acknowledged_request_is_a_new_request(tmp_path: Path) -> None:
    with LogWriter(tmp_path, "w", 0) as writer, LogWriter(tmp_path, "w", 1) as second:
        writer.open(request_of("a", attempt=2))
        writer.append([new_tokens("a", 0, 5, 1, "stop")])
        keeper = LogKeeper(tmp_path)
        keeper.acknowledge({"a": 2})
        assert recover(tmp_path).requests == {}
        assert recover(tmp_path).acknowledged == {"a": 2}
        second.open(request_of("a", attempt=3))
        second.append([new_tokens("a", 0, 2, 7)])
    assert keeper.compact().deleted == 1
    got = recover(tmp_path).requests["a"]
    assert (got.versions, got.finish_reason, got.attempt) == ([7, 7], None, 3)
    keeper.close()


def test_a_segment_with_a_writer_is_left_alone(tmp_path: Path) -> None:
    keeper = LogKeeper(tmp_path)
    with LogWriter(tmp_path, "w", 0) as writer:
        writer.open(request_of("a"))
        writer.append([new_tokens("a", 0, 1, 1, "stop")])
        keeper.acknowledge({"a": 0})
        assert keeper.compact().deleted == 0
        writer.open(request_of("b"))
        writer.append([new_tokens("b", 0, 1, 1)])
        assert recover(tmp_path).requests.keys() == {"b"}
    assert keeper.compact().deleted == 0
    keeper.acknowledge({"b": 0})
    assert keeper.compact().deleted == 1
    keeper.close()


def test_a_mostly_dead_segment_is_written_anew(tmp_path: Path) -> None:
    names = [f"r{number}" for number in range(32)]
    with LogWriter(tmp_path, "w", 0) as writer:
        writer.weights(1, "sum")
        for name in names:
            writer.open(request_of(name))
        for position in range(0, 400, 2):
            fields = {"r4": {"routes": [b"x", b"y"]}}
            writer.append([new_tokens(name, position, 1, 1) for name in names if name != "r4"])
            writer.append([new_tokens(name, position + 1, 1, 1) for name in names if name != "r4"])
            writer.append([new_tokens("r4", position, 2, 1)], fields)
        writer.append([new_tokens(name, 400, 1, 1, "stop") for name in names])
    before = recover(tmp_path)
    keeper = LogKeeper(tmp_path)
    keeper.acknowledge({name: 0 for name in names if name not in ("r3", "r4")})
    result = keeper.compact()
    assert (result.deleted, result.rewritten) == (0, 1)
    assert result.freed_bytes > 60_000
    after = recover(tmp_path)
    assert not after.damage and not after.torn
    assert after.requests == {name: before.requests[name] for name in ("r3", "r4")}
    assert after.weights == {1: "sum"}
    assert keeper.compact().rewritten == 0
    keeper.acknowledge({"r3": 0, "r4": 0})
    assert keeper.compact().deleted == 1
    keeper.close()


def test_old_acknowledgements_are_forgotten(tmp_path: Path) -> None:
    keeper = LogKeeper(tmp_path)
    sizes = []
    for round_number in range(12):
        names = [f"round{round_number:02}/{number:03}" for number in range(500)]
        with LogWriter(tmp_path, "w", round_number) as writer:
            for name in names:
                writer.open(request_of(name))
            writer.append([new_tokens(name, 0, 1, 1, "stop") for name in names])
        keeper.acknowledge(dict.fromkeys(names, 0))
        keeper.compact()
        sizes.append((tmp_path / "acknowledged").stat().st_size)
        assert recover(tmp_path).requests == {}
    assert max(sizes[6:]) <= max(sizes[:6])
    assert len(keeper.acknowledged) <= 1500
    keeper.close()


def test_acknowledgements_that_do_not_fit_are_an_error_and_the_others_stay(tmp_path: Path, small_files: int) -> None:
    keeper = LogKeeper(tmp_path)
    done = 0
    with pytest.raises(RunFailed, match=f"{tmp_path}: the rollout log cannot be kept"):
        for number in range(100):
            keeper.acknowledge({f"request {number:03}": 0})
            done += 1
    keeper.close()
    recovered = recover(tmp_path)
    assert 10 < done < 100
    assert list(recovered.acknowledged) == [f"request {number:03}" for number in range(done)]
    assert not recovered.damage


def test_acknowledging_goes_on_while_segments_are_compacted(tmp_path: Path) -> None:
    keeper = LogKeeper(tmp_path)
    run = made_log(tmp_path, seed=8, steps=400)
    with ThreadPoolExecutor(1) as thread:
        compactions = thread.submit(lambda: [keeper.compact() for _ in range(30)])
        for name in run.finished:
            keeper.acknowledge({name: 1})
        deleted = sum(one.deleted for one in compactions.result())
    assert deleted + keeper.compact().deleted > 0
    assert recover(tmp_path).requests.keys() == set(run.unfinished)
    keeper.close()


def test_a_directory_has_one_keeper(tmp_path: Path) -> None:
    keeper = LogKeeper(tmp_path)
    with pytest.raises(RunFailed, match="belongs to a run that is still alive"):
        LogKeeper(tmp_path)
    keeper.close()
    LogKeeper(tmp_path).close()


def test_segment_names_with_dashes_are_read_back() -> None:
    name = SegmentName("rollout-worker-3", 12, 7)
    assert SegmentName.parse(str(name)) == name
    assert SegmentName.parse("acknowledged") is None


def test_a_token_in_a_steady_batch_costs_less_than_ten_bytes(tmp_path: Path) -> None:
    names = [f"r{number}" for number in range(64)]
    with LogWriter(tmp_path, "w", 0) as writer:
        for name in names:
            writer.open(request_of(name))
        path = tmp_path / "w-0-000000.log"
        before = path.stat().st_size
        for position in range(100):
            writer.append([new_tokens(name, position, 1, 1) for name in names])
        assert (path.stat().st_size - before) / 6400 < 10
