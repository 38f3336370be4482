"""Weights from a trainer's GPU to the engines' GPUs by broadcast: NCCL between GPUs, gloo between CPUs.

    listener = listen(host)                                       in the trainer; its port goes to the engines
    sender = Broadcast(0, 1 + engines, host, port, listener)      in the trainer ...
    receiver = Broadcast(rank, 1 + engines, host, port)           ... and at the same time in each engine
    sender.send(update_tensors, version, checksums)
    version, tensors, checksums = receiver.receive()              for `Engine.load_weights`

The group is torch's own, made beside the process's default one, which belongs to vLLM or to the trainer's data
parallelism. A process that dies breaks the group: the others' next call fails after the timeout, and a new group is
made with a new listener. Engines that start later have no part in it: they receive what a `WeightStore` holds.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.errors import RunFailed

LOOPBACK = "127.0.0.1"


def listen(host: str = LOOPBACK) -> socket.socket:
    """A socket on a free port of this address only, for the group's meeting place."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen()
    return listener


class Broadcast:
    """One process's end of the group; rank 0 sends.

    Args:
        rank: Of this process.
        size: Processes in the group.
        host, port: Where rank 0 listens.
        listener: Rank 0's socket (`listen`).
        device: Of the tensors; CUDA means NCCL, one GPU for each process.
        timeout_s: How long a process waits for the others.

    Raises:
        RunFailed: the others did not come.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        host: str,
        port: int,
        listener: socket.socket | None = None,
        device: str | torch.device = "cpu",
        timeout_s: float = 300,
    ) -> None:
        self._rank, self._device, self._sent = rank, torch.device(device), 0
        timeout = timedelta(seconds=timeout_s)
        options: dict[str, Any] = {"is_master": rank == 0, "timeout": timeout, "wait_for_workers": False}
        if listener is not None:  # otherwise torch would listen on all addresses
            options |= {"master_listen_fd": listener.detach(), "use_libuv": False}
        try:
            self._store = dist.TCPStore(host, port, size, **options)
            self._group = _group(dist.PrefixStore("weights", self._store), rank, size, host, self._device, timeout)
        except RuntimeError as error:
            raise RunFailed(f"the group that broadcasts weights was not completed: {error}") from error

    def send(self, weights: Mapping[str, Tensor], version: int, checksums: Mapping[str, str]) -> None:
        """Send tensors to all; returns when they are on their way out of `weights`' memory.

        Args:
            weights: On the group's device: those that changed.
            version: Theirs.
            checksums: Of all weights of the version.
        """
        header = {
            "version": version,
            "checksums": dict(checksums),
            "tensors": [
                (name, str(value.dtype).removeprefix("torch."), value.shape) for name, value in weights.items()
            ],
        }
        self._store.set(f"header/{self._sent}", json.dumps(header))
        self._sent += 1
        self._broadcast(value.detach().contiguous() for value in weights.values())

    def receive(self) -> tuple[int, dict[str, Tensor], dict[str, str]]:
        """Wait for the next version; returns its number, the tensors sent, and the checksums of all weights.

        Raises:
            RunFailed: nothing came in time, or the sender is gone.
        """
        try:
            header = json.loads(self._store.get(f"header/{self._sent}"))
        except RuntimeError as error:
            raise RunFailed(f"no weights were broadcast: {error}") from error
        self._sent += 1
        tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)
            for name, dtype, shape in header["tensors"]
        }
        self._broadcast(tensors.values())
        return header["version"], tensors, header["checksums"]

    def _broadcast(self, tensors: Iterable[Tensor]) -> None:
        """In the same order everywhere; as bytes, since no backend knows all dtypes."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            for tensor in tensors:
                if tensor.numel():
                    self._group.broadcast([tensor.view(-1).view(torch.uint8)], options).wait()
        except RuntimeError as error:
            raise RunFailed(f"the broadcast of weights broke off: {error}") from error
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Leave the group."""
        self._group.shutdown()


def _group(
    store: dist.Store, rank: int, size: int, host: str, device: torch.device, timeout: timedelta
) -> dist.ProcessGroup:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, nccl)
    gloo = dist.ProcessGroupGloo._Options()
    gloo._timeout = timeout
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(store, rank, size, gloo)
