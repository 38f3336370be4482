"""The Gluon kernel of sparse attention: anywhere, that it compiles for Hopper; on such a GPU, its numbers and bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from posttrain import kernels
from posttrain.kernels.attention import hopper, oracle
from posttrain.kernels.attention import triton as forward
from tests.test_triton_attention import Indices, attention, index_rows
from tests.triton_kit import DEVICE, assert_agrees, assert_close, normal, running

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU: Gluon has no interpreter")
DIM, SHARED_BYTES = 512, 227 * 1024

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs_of(tokens: int, heads: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Indices, Inputs]:
    """Lists with gaps, some of them longer than two blocks of entries, some empty."""
    torch.manual_seed(tokens + heads)
    indices = index_rows(tokens, 96, 90, 0.7), index_rows(tokens, 160, 200, 0.9)
    indices[0][::3], indices[1][1::3] = -1, -1
    q, a, b = (normal(*shape).to(dtype) for shape in ((tokens, heads, DIM), (90, DIM), (200, DIM)))
    return indices, (q, a, b, normal(heads))


def run(indices: Indices, q: Tensor, a: Tensor, b: Tensor, sink: Tensor) -> Tensor:
    with running("triton"), torch.no_grad():
        return attention(kernels.sparse_attention, indices, DIM**-0.5)(q, a, b, sink)


@pytest.fixture
def never_served(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hopper, "serves", lambda q_THD: False)
    yield


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_compiles_for_hopper_into_its_shared_memory_with_whole_copies(dtype: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile_for_hopper", dtype]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert found["shared_bytes"] <= SHARED_BYTES
    assert found["copies"] and all("0x10" in copy for copy in found["copies"]), found["copies"][:1]


@on_hopper
@pytest.mark.parametrize("heads", [33, 64, 128])
def test_agrees_with_the_oracle(heads: int) -> None:
    indices, inputs = inputs_of(23, heads)
    assert hopper.serves(inputs[0])
    ours = attention(kernels.sparse_attention, indices, DIM**-0.5)
    assert_agrees(ours, attention(oracle.sparse_attention, indices, DIM**-0.5), *inputs, dtype=torch.bfloat16)


@on_hopper
def test_agrees_with_the_kernel_in_triton_denominators_too(never_served: None) -> None:
    indices, (q, a, b, sink) = inputs_of(23, 64, torch.float16)
    entries = forward.pack(a, b, *indices)
    out, lse = hopper.attend(q, sink, 0.1, entries)
    expected, expected_lse = forward.attend(q, sink, 0.1, entries)
    assert_close(out, expected, 2e-3, "result")
    assert_close(lse, expected_lse, 1e-5, "denominators")


@on_hopper
def test_a_token_has_its_bits_alone_in_any_order_and_again() -> None:
    indices, (q, a, b, sink) = inputs_of(40, 64)
    together = run(indices, q, a, b, sink)
    assert torch.equal(together, run(indices, q, a, b, sink))
    order = torch.randperm(40, device=DEVICE)
    moved = run((indices[0][order], indices[1][order]), q[order], a, b, sink)
    assert torch.equal(moved, together[order])
    for t in (0, 1, 39):
        alone = run((indices[0][t : t + 1], indices[1][t : t + 1]), q[t : t + 1], a, b, sink)
        assert torch.equal(alone, together[t : t + 1])


@on_hopper
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_columns_of_a_wider_cache_and_stores_in_fp32_give_the_same_bits(offset: int) -> None:
    indices, (q, a, b, sink) = inputs_of(9, 64)
    expected = run(indices, q, a, b, sink)
    cache = torch.full((len(b), DIM + 137), float("nan"), device=DEVICE, dtype=b.dtype)
    cache[:, offset : offset + DIM] = b
    assert torch.equal(run(indices, q, a, cache[:, offset : offset + DIM], sink), expected)
    assert torch.equal(run(indices, q, a.float(), b.float(), sink), expected)


@on_hopper
def test_a_row_beyond_the_store_spoils_its_token_only() -> None:
    indices, (q, a, b, sink) = inputs_of(9, 64)
    expected = run(indices, q, a, b, sink)
    indices[1][4, 0] = len(b)
    out = run(indices, q, a, b, sink)
    assert out[4].isnan().all()
    others = torch.arange(9, device=DEVICE) != 4
    assert torch.equal(out[others], expected[others])


@on_hopper
@pytest.mark.parametrize("sink", [-200.0, 200.0])
def test_scores_far_apart_do_not_overflow(sink: float) -> None:
    indices, (q, a, b, sinks) = inputs_of(9, 64)
    out = run(indices, q * 50, a, b, torch.full_like(sinks, sink))
    exact = attention(oracle.sparse_attention, indices, DIM**-0.5)
    assert_close(out, exact((q * 50).double(), a.double(), b.double(), torch.full_like(sinks, sink)), 2e-2, "result")
