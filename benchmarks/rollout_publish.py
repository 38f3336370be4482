"""`python -m benchmarks.rollout_publish [--quick]`: what it takes to bring weights from a trainer into engines.

Two engines in Ray actors, as the rollout service has them. Every time includes all checksums: the sender's, the
store's, the engine's on arrival, and those of everything that stands in the engine afterwards. Then each part of an
update of larger weights by itself: what another way of transport could save. Last, what sending only the changed bytes
of bf16 weights would take and save.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import Spread, seconds, take_turns
from posttrain.cluster import reach_other_machines
from posttrain.files import atomic_write
from rollouts.settings import EngineSettings, engine_environment

ENGINES = 2
PART_BYTES = 64 << 20
LEARNING_RATES = (1e-6, 1e-5, 1e-4)


class Host:
    """An engine in an actor."""

    def __init__(self, settings: EngineSettings) -> None:
        from rollouts.engine import Engine

        self._engine = Engine(settings)

    def receive(self, published: Any) -> float:
        """Seconds that the engine stood still."""
        from rollouts.publishing import receive

        return seconds(lambda: receive(self._engine, published))

    def audit(self) -> float:
        """Seconds."""
        return seconds(self._engine.audit)


def main() -> None:
    """Print a table, write publish.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout_publish", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repeats: a check, not a measurement")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="directory of publish.json")
    arguments = parser.parse_args()
    os.environ.update(engine_environment(1) | {"RAY_AUTH_MODE": "disabled"})
    import ray

    reach_other_machines(False)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        repeats = 3 if arguments.quick else 20
        results = {
            "engines": ENGINES,
            "repeats": repeats,
            **publishing(repeats),
            "parts": parts(repeats),
            "bytes": changed_bytes(repeats),
        }
    finally:
        ray.shutdown()
    atomic_write(arguments.output / "publish.json", json.dumps(results, indent=2) + "\n")
    show(results)


def publishing(repeats: int) -> dict[str, Any]:
    """The tiny model, through the object store and through files, all tensors and one layer's experts."""
    import ray
    import torch

    from benchmarks.models import v4_config
    from benchmarks.rollout import ROLLOUT
    from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
    from rollouts.publishing import WeightStore
    from rollouts.settings import engine_settings, write_description

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = DeepseekV4ForCausalLM(v4_config())
        model.save_pretrained(directory / "checkpoint")
        write_description(directory / "checkpoint", directory / "description", "native")
        settings = engine_settings(directory / "description", "native", ROLLOUT, threads=1)
        actor = ray.remote(Host).options(num_cpus=0.01, runtime_env={"env_vars": engine_environment(1)})
        hosts = [actor.remote(settings) for _ in range(ENGINES)]
        weights = dict(model.engine_state_dict())
        version = 0

        def update(store: WeightStore, changed: Mapping[str, Any]) -> dict[str, float]:
            nonlocal version
            version += 1
            for tensor in changed.values():
                tensor.add_(1e-3)
            return one_update(store, weights, version, hosts)

        trainable = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
        few = {name: tensor for name, tensor in trainable.items() if name.startswith("model.layers.1.ffn.experts")}
        found = {}
        for place, shared in (("object store", True), ("files", False)):
            store = WeightStore(directory / place, shared)
            update(store, trainable)
            for what, changed in (("all tensors", trainable), ("one layer's experts", few)):
                times = [update(store, changed) for _ in range(repeats)]
                found[f"{what}, {place}"] = {key: Spread.of([one[key] for one in times]).as_dict() for key in times[0]}
        audits = [ray.get(hosts[0].audit.remote()) for _ in range(repeats + 1)][1:]
    size = sum(tensor.nbytes for tensor in weights.values())
    return {"tensors": len(weights), "size": size, "updates": found, "audit": Spread.of(audits).as_dict()}


def one_update(store: Any, weights: Mapping[str, Any], version: int, hosts: list[Any]) -> dict[str, float]:
    """Seconds of each part of one update."""
    import ray

    from rollouts.weights import WeightUpdate

    begin = time.perf_counter()
    packed = WeightUpdate.pack(weights, version, store.checksums)
    after_pack = time.perf_counter()
    published = store.put(packed)
    after_put = time.perf_counter()
    held = ray.get([host.receive.remote(published) for host in hosts])
    end = time.perf_counter()
    return {"pack": after_pack - begin, "put": after_put - after_pack, "engine": max(held), "total": end - begin}


def parts(repeats: int) -> dict[str, Any]:
    """One tensor of `PART_BYTES`: its checksum, its way into the object store, out of it, and into an engine."""
    import numpy as np
    import ray
    import torch

    from rollouts.weights import PackedTensor

    torch.set_num_threads(1)
    packed = PackedTensor.of(np.random.default_rng(0).standard_normal(PART_BYTES // 4, dtype=np.float32))
    stored, engine = ray.put(packed), torch.empty(PART_BYTES // 4)
    times = take_turns(
        {
            "checksum": packed.checksum,
            "into the store": lambda: ray.put(packed),
            "out of the store": lambda: ray.get(stored),
            "into the engine": lambda: engine.copy_(packed.tensor()),
        },
        repeats,
    )
    return {"bytes": PART_BYTES, **{key: Spread.of(value).as_dict() for key, value in times.items()}}


def changed_bytes(repeats: int) -> list[dict[str, Any]]:
    """bf16 copies of fp32 masters before and after an AdamW step: how much changes, and what a patch would take.

    The patch is the positions and new values of the changed elements; applying it gives the new weights to the bit.
    The alternative is what the object store does: one copy in, and the engine reads from there.
    """
    import numpy as np
    import torch

    generator = torch.Generator().manual_seed(0)
    found = []
    for rate in LEARNING_RATES:
        master = torch.nn.Parameter(torch.randn(1 << 22, generator=generator) * 0.02)
        optimizer = torch.optim.AdamW([master], lr=rate)
        for _ in range(3):
            before = master.detach().bfloat16()
            master.grad = torch.randn(master.shape, generator=generator)
            optimizer.step()
        old = before.view(torch.int16).numpy()
        new = master.detach().bfloat16().view(torch.int16).numpy()
        rows = np.flatnonzero(old != new).astype(np.uint32)
        values, engine = new[rows], old.copy()

        def make(old: Any = old, new: Any = new) -> None:
            new[np.flatnonzero(old != new).astype(np.uint32)]

        def apply(engine: Any = engine, rows: Any = rows, values: Any = values) -> None:
            engine[rows] = values

        times = take_turns({"make": make, "apply": apply, "copy": new.copy}, repeats)
        assert (engine == new).all()
        spreads = {f"{key}_seconds": Spread.of(value).as_dict() for key, value in times.items()}
        sizes = {"whole_bytes": new.nbytes, "patch_bytes": rows.nbytes + values.nbytes}
        found.append({"learning_rate": rate, "changed": len(rows) / len(new), **sizes, **spreads})
    return found


def show(results: dict[str, Any]) -> None:
    """Medians in ms."""
    what = f"{results['tensors']} tensors, {results['size'] / 2**20:.2f} MiB, {results['engines']} engines"
    print(f"{what}; ms: median (lowest to highest)")
    for name, parts in results["updates"].items():
        print(f"  {name:36}", *(f"{key} {_ms(spread)}" for key, spread in parts.items()), sep="  ")
    print(f"  {'audit of one engine':36}  {_ms(results['audit'])}")
    print(f"parts of an update of {results['parts'].pop('bytes') >> 20} MiB:")
    for name, spread in results["parts"].items():
        print(f"  {name:36}  {_ms(spread)}")
    print(
        "bf16 weights after a step of AdamW: share that changed, patch / whole bytes;",
        "ms to make and apply a patch, to copy all",
    )
    for row in results["bytes"]:
        parts = (_ms(row[f"{key}_seconds"]) for key in ("make", "apply", "copy"))
        share = f"{row['changed']:.1%}  {row['patch_bytes'] / row['whole_bytes']:.2f}"
        print(f"  lr {row['learning_rate']:.0e}  {share}", *parts, sep="  ")


def _ms(spread: dict[str, float]) -> str:
    return f"{spread['median'] * 1e3:.1f} ({spread['lowest'] * 1e3:.1f} to {spread['highest'] * 1e3:.1f})"


if __name__ == "__main__":
    main()
