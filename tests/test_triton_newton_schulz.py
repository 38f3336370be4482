"""Newton-Schulz on Triton, in bf16: against the oracle in fp64, and bit by bit against itself."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain.kernels.newton_schulz import oracle
from posttrain.kernels.newton_schulz import triton as ours
from posttrain.kernels.newton_schulz.op import newton_schulz
from tests.triton_kit import DEVICE, normal, running

ROUNDING = 2**-7
"""A result in bf16, rounded or cut off, relative to the largest value."""

BOUND = 0.03
"""Of an update's error, relative to its norm: each of ten steps rounds two matrices and the iterate to bf16 (2⁻⁸ each,
independent errors: √30 · 2⁻⁸ = 0.021)."""

TILES = [
    ours.Tiles(16, 16, 16, 4, 3),
    ours.Tiles(16, 32, 16, 4, 3),
    ours.Tiles(32, 64, 32, 4, 2),
    ours.Tiles(16, 64, 32, 4, 2),
]
"""Square tiles and tiles of two and four times more columns; the last three cross the diagonal."""

examples = settings(max_examples=15, deadline=None, derandomize=True)


def update(matrices: Tensor) -> Tensor:
    with running("triton"):
        return newton_schulz(matrices)


@examples
@given(
    *(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 100), st.integers(1, 70)),
    *(st.sampled_from(TILES), st.booleans()),
)
def test_symmetric_products(seed: int, count: int, size: int, inner: int, tiles: ours.Tiles, descriptors: bool) -> None:
    torch.manual_seed(seed)
    before, ours.DESCRIPTORS = ours.DESCRIPTORS, descriptors
    try:
        a = normal(count, size, inner).bfloat16()
        gram, polynomial = (a.new_full((count, size, size), float("nan")) for _ in range(2))
        ours.symmetric_product(a, gram, 1.0, tiles=tiles)
        ours.symmetric_product(gram, polynomial, 2.0315, -4.775, tiles=tiles)
    finally:
        ours.DESCRIPTORS = before
    for found, expected in (
        (gram, a.double() @ a.double().mT),
        (polynomial, 2.0315 * gram.double() @ gram.double() - 4.775 * gram.double()),
    ):
        assert (found.double() - expected).abs().max() <= ROUNDING * expected.abs().max()
        assert torch.equal(found, found.mT)


@triton.jit
def tiles_kernel(rows, columns, RATIO: tl.constexpr):
    """Row and column of this program's tile."""
    place = tl.program_id(0)
    row, column = ours.lower_tile(place, RATIO)
    tl.store(rows + place, row)
    tl.store(columns + place, column)


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_tiles_cover_the_lower_triangle_once(ratio: int) -> None:
    groups = 20
    expected = [(row, column) for row in range(groups * ratio) for column in range(row // ratio + 1)]
    found = torch.full((2, len(expected)), -1, dtype=torch.int32, device=DEVICE)
    tiles_kernel[(len(expected),)](*found, RATIO=ratio)
    assert list(zip(*found.tolist(), strict=True)) == expected


@examples
@given(
    *(st.integers(0, 2**31), st.integers(1, 3), st.integers(2, 70), st.integers(2, 70)),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_an_update_is_that_of_the_oracle(seed: int, count: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    matrices = normal(count, rows, columns).to(dtype)
    found, expected = update(matrices), oracle.newton_schulz(matrices.double())
    assert found.dtype is dtype
    assert found.shape == expected.shape
    # Singular values that the steps have not brought to one yet grow by 3.4 a step, and so do their errors.
    settled = (torch.linalg.svdvals(expected) > 0.99).all(1)
    error = (found.double() - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    assert (error[settled] <= BOUND).all()
    assert found.isfinite().all()


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (48, 48)])
def test_an_update_is_orthogonal(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    singular_values = torch.linalg.svdvals(update(normal(3, *shape)))
    assert (singular_values - 1).abs().max() < 0.03


def test_scale_does_not_matter() -> None:
    torch.manual_seed(0)
    matrices = normal(4, 16, 40)
    scales = torch.tensor([2.0**-40, 2.0**-10, 1.0, 2.0**30], device=DEVICE)
    assert torch.equal(update(matrices * scales[:, None, None]), update(matrices))


def test_a_matrix_of_zeros_stays_zero() -> None:
    torch.manual_seed(0)
    gradient = normal(4, 8, 16)
    gradient[2] = 0
    found = update(gradient)
    assert found[2].abs().max() == 0
    assert found.isfinite().all()


def test_no_matrices() -> None:
    assert update(normal(0, 8, 16)).shape == (0, 8, 16)


def test_the_same_call_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    matrices = normal(5, 24, 40)
    assert torch.equal(update(matrices), update(matrices))


def test_matrices_that_do_not_fit_the_workspace_go_through_it_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    matrices = normal(5, 24, 40)
    expected = update(matrices)
    monkeypatch.setattr(ours, "WORKSPACE", 1)
    assert (update(matrices) - expected).abs().max() <= BOUND


def test_descriptors_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    matrices = normal(1, 130, 72)
    expected = update(matrices)
    monkeypatch.setattr(ours, "DESCRIPTORS", False)
    assert torch.equal(update(matrices), expected)


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (torch.zeros(3, 4), r"newton_schulz: matrices has shape \[3, 4\]; expected \[K, N, M\]"),
        (torch.zeros(2, 3, 4, dtype=torch.float16), "newton_schulz: matrices is torch.float16; expected torch.float32"),
    ],
)
def test_a_bad_input_is_named(matrices: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        update(matrices)
