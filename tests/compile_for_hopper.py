"""Compiles the Gluon kernel for Hopper, which needs no GPU, and prints what came of it as JSON.

A program of its own: in the tests' process Triton's own functions belong to its interpreter.
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from posttrain.kernels.attention import hopper


def compiled(dtype: str) -> dict[str, object]:
    """Bytes of shared memory, and the copies from global memory, of queries in this dtype."""
    pointers = dict.fromkeys(("q", "store_a", "store_b"), f"*{dtype}")
    pointers |= {"rows": "*i32", "counts": "*i32", "sink": "*fp32", "out": f"*{dtype}", "lse": "*fp32"}
    numbers = dict.fromkeys(("vectors_a", "vectors_b", "columns_a", "columns"), "i32")
    signature = {**pointers, **numbers, "scale": "fp32", "HEADS": "constexpr"}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(pointers))}
    source = GluonASTSource(hopper.forward_kernel, signature, constexprs={"HEADS": 64}, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": hopper.WARPS})
    copies = [line.strip() for line in kernel.asm["ptx"].splitlines() if "cp.async.c" in line and "global" in line]
    return {"shared_bytes": kernel.metadata.shared, "copies": copies}


if __name__ == "__main__":
    print(json.dumps(compiled(sys.argv[1])))
