"""Speed of the hybrid Newton-Schulz iteration at V4-Flash's shapes on one GPU, against batched products in torch."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import matmul_ceiling, peak_bytes, seconds
from posttrain.kernels.newton_schulz import oracle
from posttrain.kernels.newton_schulz import triton as ours
from posttrain.kernels.newton_schulz.op import newton_schulz

SHAPES = {
    "experts' gate and up": (2048, 4096),
    "experts' down": (4096, 2048),
    "wq_a": (1024, 4096),
    "wkv": (512, 4096),
    "square": (4096, 4096),
}
CANDIDATES = [
    ours.LARGE,
    ours.Tiles(128, 256, 64, warps=8, stages=4),
    ours.Tiles(128, 128, 64, warps=8, stages=3),
    ours.Tiles(128, 128, 64, warps=4, stages=4),
    ours.Tiles(64, 256, 64, warps=4, stages=3),
]


def operations(count: int, rows: int, columns: int) -> float:
    """Of ten steps without regard to symmetry: `X Xᵀ`, `G²` and `P X`."""
    short, long = min(rows, columns), max(rows, columns)
    return 10.0 * count * (4.0 * short * short * long + 2.0 * short**3)


def iteration(count: int, rows: int, columns: int, peer: bool) -> dict[str, float]:
    """Seconds for the batch, the rate as if nothing were symmetric, and torch in bf16 beside it."""
    matrices = torch.randn(count, rows, columns, device="cuda", dtype=torch.bfloat16)
    work, taken = operations(count, rows, columns), seconds(lambda: newton_schulz(matrices), repeats=5, warm_up=2)
    values = torch.linalg.svdvals(newton_schulz(matrices[:1]).float())
    result = {
        "seconds": taken,
        "fraction_of_ceiling": work / matmul_ceiling() / taken,
        "peak_bytes": peak_bytes(lambda: newton_schulz(matrices)),
        "smallest_singular_value": float(values.min()),
        "largest_singular_value": float(values.max()),
    }
    if peer:
        result["torch_bf16_seconds"] = seconds(lambda: oracle.newton_schulz(matrices), repeats=5, warm_up=2)
    return result


def tile_choices(count: int, size: int, inner: int) -> dict[str, float]:
    """TFLOP/s of the whole (not the half) product `A Aᵀ`, for each tile and for torch."""
    a = torch.randn(count, size, inner, device="cuda", dtype=torch.bfloat16)
    out = a.new_empty(count, size, size)
    work = 2.0 * count * size * size * inner / 1e12
    found = {"torch": work / seconds(lambda: torch.bmm(a, a.mT, out=out))}
    expected: Tensor | None = None
    for tiles in CANDIDATES:
        name = f"{tiles.rows}x{tiles.columns}x{tiles.inner} warps {tiles.warps} stages {tiles.stages}"
        try:
            ours.symmetric_product(a, out, 1.0, tiles=tiles)
            expected = out.clone() if expected is None else expected
            name += "" if torch.equal(out, expected) else " OTHER BITS"
            taken = seconds(lambda tiles=tiles: ours.symmetric_product(a, out, 1.0, tiles=tiles))  # type: ignore[misc]
        except Exception as error:  # a candidate that this Triton or GPU cannot run says so in the table
            found[f"{name} ({type(error).__name__})"] = 0.0
            continue
        found[name] = work / taken
    return found


def measure(quick: bool) -> dict[str, Any]:
    """All numbers; `quick` takes fewer matrices and only the experts'."""
    count = 8 if quick else 32
    shapes = dict(list(SHAPES.items())[:2]) if quick else SHAPES
    return {
        "matmul_flops": matmul_ceiling(),
        "tiles, X Xᵀ of gate and up": tile_choices(count, 2048, 4096),
        "tiles, G²": tile_choices(count, 2048, 2048),
        **{f"{count} of {name}": iteration(count, *shape, peer=True) for name, shape in shapes.items()},
    }


if __name__ == "__main__":
    print(json.dumps(measure(quick="--quick" in sys.argv), indent=2, ensure_ascii=False))
