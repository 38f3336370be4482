"""The compiled kernels' own ground: vectors, imports, and the machine code kept on disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from numba.core.caching import CacheImpl

from posttrain import kernels
from posttrain.kernels import compiled as compiling
from posttrain.kernels.compiled import compiled
from posttrain.kernels.indexer.candidates import Candidates
from posttrain.kernels.simd import exp, load, store, total

KERNELS = Path(__file__).parents[1] / "posttrain" / "kernels"


@numba.njit
def exponentials(x: np.ndarray, out: np.ndarray) -> None:
    for start in range(0, len(x), 16):
        store(out, start, exp(load(x, start, len(x) - start)), len(x) - start)


def test_exp_is_right_to_two_units_in_the_last_place() -> None:
    x = np.linspace(-87, 87, 200_001, dtype=np.float32)
    out = np.empty_like(x)
    exponentials(x, out)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(out / exact - 1).max() <= 2 * np.finfo(np.float32).eps


def test_exp_keeps_its_argument_in_range_and_nan() -> None:
    x = np.array([0, -np.inf, np.inf, np.nan, -1000, 1000], np.float32)
    out = np.empty_like(x)
    exponentials(x, out)
    assert out[0] == 1
    assert np.isnan(out[3])
    assert np.isfinite(out[[1, 2, 4, 5]]).all()
    assert out[1] == out[4] < 1e-37


def test_lanes_beyond_the_count_are_neither_read_nor_written() -> None:
    @numba.njit
    def copy_five(x: np.ndarray, out: np.ndarray) -> float:
        store(out, 0, load(x, 0, 5), 5)
        return total(load(x, 0, 5))

    out = np.full(16, 7, np.float32)
    assert copy_five(np.arange(16, dtype=np.float32), out) == 10
    assert out.tolist() == [0, 1, 2, 3, 4] + [7] * 11


def run(code: str, root: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_op_table_imports_no_compiler() -> None:
    """vLLM's CPU worker fails at its start if llvmlite is there before it (see `posttrain.kernels.compiled`)."""
    code = "import sys, posttrain.kernels; print([name for name in ('numba', 'llvmlite') if name in sys.modules])"
    assert run(code, KERNELS.parents[1]) == "[]\n"


def test_kernels_are_compiled_again_when_the_vectors_change(tmp_path: Path) -> None:
    """numba itself looks only at the file of the kernel."""
    shutil.copytree(KERNELS, tmp_path / "posttrain" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import torch; from posttrain.kernels import rms_norm; print(rms_norm(torch.ones(4), eps=0.0)[0].item())"
    cache = tmp_path / "cache"
    assert float(run(code, tmp_path, NUMBA_CACHE_DIR=str(cache))) == 1
    assert list(cache.rglob("*.nbc")), "nothing was kept"
    source = tmp_path / "posttrain" / "kernels" / "simd.py"
    text = source.read_text()
    changed = text.replace("_halve(builder, args[0], builder.fadd)", "_halve(builder, args[0], builder.fsub)")
    assert changed != text
    source.write_text(changed)
    assert float(run(code, tmp_path, NUMBA_CACHE_DIR=str(cache))) != 1


def test_a_read_only_installation_compiles_without_keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])

    def double(x: float) -> float:
        return 2 * x

    assert compiled(double)(4.0) == 8


def test_autocast_narrows_neither_the_routers_nor_anything_inside_a_kernel() -> None:
    x_TH, weight_EH, bias_E = torch.randn(9, 16), torch.randn(8, 16), torch.zeros(8)
    streams_TND, fn_MC = torch.randn(9, 4, 16), torch.randn(24, 64)
    plain = kernels.route_topk(x_TH, weight_EH, bias_E, 2, 1.5)
    site = kernels.mhc_pre(streams_TND, fn_MC, torch.zeros(24), torch.ones(3), iterations=3, eps=1e-6, norm_eps=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        cast = kernels.route_topk(x_TH, weight_EH, bias_E, 2, 1.5)
        cast_site = kernels.mhc_pre(
            streams_TND, fn_MC, torch.zeros(24), torch.ones(3), iterations=3, eps=1e-6, norm_eps=1e-6
        )
    assert all(torch.equal(one, other) for one, other in zip((*plain, *site), (*cast, *cast_site), strict=True))


def test_a_kernel_refuses_memory_of_another_type() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        compiling.run(lambda *_: None, torch.zeros(2, dtype=torch.bfloat16))


@pytest.mark.parametrize("k", [1, 3, 64])
@pytest.mark.parametrize("order", ["rising", "falling", "random", "equal", "with NaN"])
def test_the_chosen_entries_are_those_of_a_stable_sort(order: str, k: int) -> None:
    torch.manual_seed(k)
    entries, tokens = 300, 5
    rising_E = torch.arange(float(entries))
    scores_E = {"rising": rising_E, "falling": -rising_E}.get(order, torch.randn(entries))
    if order == "equal":
        scores_E = scores_E.round()
    if order == "with NaN":
        scores_E[::7] = torch.nan
    # One head and one channel: an entry's score is its key, which must be positive.
    keys_SD = (scores_E - scores_E.nan_to_num().min() + 1).unsqueeze(1)
    count_T = torch.tensor([entries, 299, 150, k, 0])
    first = torch.zeros(1, 1, dtype=torch.int64)
    candidates = Candidates(count_T, torch.zeros(tokens, dtype=torch.int64), first, 304, 304)
    inputs = torch.ones(tokens, 1, 1), torch.ones(tokens, 1), keys_SD, candidates, k
    found_TK = kernels.index_topk(*inputs)
    for count, found_K in zip(count_T.tolist(), found_TK, strict=True):
        expected = keys_SD[:count, 0].sort(descending=True, stable=True).indices[:k].sort().values.tolist()
        assert found_K.tolist() == expected + [-1] * (k - len(expected))
