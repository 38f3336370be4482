"""Tapes: a computation on the CPU, done again on other numbers in the same memory."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain import kernels
from posttrain.kernels.tape import Tape, TapeFull, recording, whole

ROWS = 20


def given() -> tuple[Tensor, Tensor]:
    return torch.empty(ROWS, 64), torch.empty(ROWS, dtype=torch.int64)


def fill(x_TH: Tensor, numbers_T: Tensor, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    x_TH.copy_(torch.randn(x_TH.shape, generator=made))
    numbers_T.copy_(torch.randint(0, 8, numbers_T.shape, generator=made))


WEIGHTS = torch.randn(64, 64, generator=torch.Generator().manual_seed(9))
TABLE = torch.randn(8, 4, 32, generator=torch.Generator().manual_seed(10))
EXPERTS = [torch.randn(8, rows, 64, generator=torch.Generator().manual_seed(11 + rows)) for rows in (128, 64)]


def arithmetic(x_TH: Tensor, numbers_T: Tensor) -> Tensor:
    """Views, copies, other dtypes, in-place changes, constants, operations with several results."""
    first, second = x_TH.chunk(2, 1)
    mixed = torch.where(first > 0, first, second.to(torch.bfloat16).float())
    mixed = torch.cat((mixed, TABLE[numbers_T].transpose(1, 2).reshape(ROWS, -1)[:, ::4]), 1)
    values, order = mixed.sort(1)
    order = order.masked_fill_(values < 0, 1) + torch.arange(order.shape[1])
    parts = torch.stack((mixed.clamp(min=0), values), 1).repeat(1, 2, 1).unbind(1)
    return torch.nn.functional.pad(parts[0] - parts[3] // 0.5, (0, 3)).index_select(1, order[0] % 60)


def ops(x_TH: Tensor, numbers_T: Tensor) -> Tensor:
    """Compiled kernels, products, and experts, whose rows the host lays out."""
    x_TH = kernels.rms_norm(kernels.linear(x_TH, WEIGHTS), None)
    weights_TK = torch.stack((x_TH[:, 0].abs(), x_TH[:, 1].abs()), 1)
    experts_TK = torch.stack((numbers_T, (numbers_T + 3) % 8), 1)
    return x_TH + kernels.moe_experts(x_TH, experts_TK, weights_TK, *EXPERTS, 10.0)


@pytest.mark.parametrize("function", [arithmetic, ops])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tape_gives_what_the_computation_gives(
    function: Callable[..., Tensor], mode: Callable[[], torch.no_grad]
) -> None:
    with mode():
        inputs = given()
        fill(*inputs, 0)
        with Tape() as tape:
            result = function(*inputs)
        assert torch.equal(result, function(*inputs))
        for seed in (1, 2, 1):
            fill(*inputs, seed)
            tape.replay()
            assert torch.equal(result, function(*inputs)), seed


@pytest.mark.parametrize(
    "look",
    [lambda x: x[0, 0].item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: int(x.argmax())],
    ids=["item", "mask", "nonzero", "int"],
)
def test_what_looks_at_numbers_is_refused(look: Callable[[Tensor], object]) -> None:
    x_TH, _ = given()
    with pytest.raises(RuntimeError, match="looks at numbers"), torch.no_grad(), Tape():
        look(x_TH.zero_())
    assert recording() is None


def test_a_part_that_decides_decides_again() -> None:
    def sign(x: Tensor) -> Tensor:
        return x + 1 if x.sum().item() > 0 else x - 1

    x = torch.ones(3)
    with torch.no_grad(), Tape() as tape:
        result = 2 * whole(sign, x)
    assert result.tolist() == [4, 4, 4]
    x.fill_(-1)
    tape.replay()
    assert result.tolist() == [-4, -4, -4]


def test_numbers_that_are_made_once_may_not_be_written_to() -> None:
    with pytest.raises(RuntimeError, match="makes once"), torch.no_grad(), Tape():
        torch.arange(4).add_(1)


def test_other_threads_leave_nothing_on_it() -> None:
    x = torch.ones(4, 16)
    with torch.no_grad(), Tape() as tape:
        other = threading.Thread(target=kernels.rms_norm, args=(x,))
        other.start()
        other.join()
        assert tape._steps == []
        kernels.rms_norm(x)
        assert len(tape._steps) == 1


def test_one_tape_at_a_time_and_none_with_gradients() -> None:
    with pytest.raises(RuntimeError, match="without gradients"):
        Tape().__enter__()
    with torch.no_grad(), Tape() as tape:
        with pytest.raises(RuntimeError, match="one tape"):
            Tape().__enter__()
        assert recording() is tape
    assert recording() is None


def test_it_counts_the_memory_that_it_keeps() -> None:
    x = torch.ones(1000)
    with torch.no_grad(), Tape() as tape:
        y = (x[:500] + 1).view(5, 100)
        y.mul_(2)
        (y * 3).t()
    assert tape.nbytes == 2 * 500 * 4
    with pytest.raises(TapeFull), torch.no_grad(), Tape(limit=tape.nbytes - 1):
        x[:500] + 1, x[500:] + 1
    assert recording() is None
