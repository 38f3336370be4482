"""Broadcast of weights between two real processes: gloo here, NCCL where there are two GPUs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest
import torch

from posttrain.errors import RunFailed
from rollouts.broadcast import LOOPBACK, Broadcast, listen
from rollouts.weights import checksum_of


def weights_of(seed: int, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "experts": torch.randn(8, 30, 20, generator=generator),
        "matrix": torch.randn(64, 33, generator=generator).bfloat16(),
        "transposed": torch.randn(5, 7, generator=generator).T,
        "scalar": torch.randn((), generator=generator),
        "empty": torch.zeros(0, 3),
        "table": torch.randint(0, 99, (40, 2), generator=generator),
        "scales": torch.randint(0, 255, (9,), generator=generator, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }
    return {name: tensor.to(device) for name, tensor in weights.items()}


def receiver(port: int, device: str, count: int, pipe: Connection) -> None:
    """In the other process: report versions and checksums of what arrives."""
    group = Broadcast(1, 2, LOOPBACK, port, device=device, timeout_s=20)
    try:
        for _ in range(count):
            version, tensors, announced = group.receive()
            own = {name: checksum_of(tensor) for name, tensor in tensors.items()}
            pipe.send((version, own, announced, {str(tensor.device) for tensor in tensors.values()}))
        pipe.send(group.receive())
    except RunFailed as error:
        pipe.send(str(error))


@contextmanager
def two_processes(device: str, other_device: str, count: int) -> Iterator[tuple[Broadcast, Connection]]:
    listener = listen()
    assert listener.getsockname()[0] == LOOPBACK
    port = listener.getsockname()[1]
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=receiver, args=(port, other_device, count, theirs))
    process.start()
    try:
        yield Broadcast(0, 2, LOOPBACK, port, listener, device=device, timeout_s=20), ours
    finally:
        process.terminate()
        process.join()


def exchange(device: str, other_device: str) -> None:
    with two_processes(device, other_device, count=2) as (group, pipe):
        for version in (4, 5):
            weights = weights_of(version, device)
            changed = {name: weights[name] for name in ("matrix", "scales")} if version == 5 else weights
            checksums = {name: checksum_of(tensor) for name, tensor in weights.items()}
            group.send(changed, version, checksums)
            received = pipe.recv()
            assert received == (version, {name: checksums[name] for name in changed}, checksums, {other_device})
        group.close()
        del group


def test_weights_arrive_bit_by_bit_over_gloo() -> None:
    exchange("cpu", "cpu")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each process: there are not two")
def test_weights_arrive_bit_by_bit_over_nccl() -> None:
    exchange("cuda:0", "cuda:1")


def test_a_sender_that_is_gone_fails_the_receiver_by_name() -> None:
    with two_processes("cpu", "cpu", count=0) as (group, pipe):
        group.close()
        del group  # its meeting place goes with it
        assert "no weights were broadcast" in pipe.recv()


def test_a_receiver_that_never_comes_fails_the_sender() -> None:
    listener = listen()
    port = listener.getsockname()[1]
    with pytest.raises(RunFailed, match="was not completed"):
        Broadcast(0, 2, LOOPBACK, port, listener, timeout_s=1)
