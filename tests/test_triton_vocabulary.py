"""Log-probabilities and divergences over the vocabulary: Triton and the CPU's path against dense logits, and TRL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.gpu.vocabulary import trl_file, trl_kernels
from posttrain.kernels import divergence_gradients, linear, linear_divergence, linear_logprob
from posttrain.kernels.backend import Backend
from posttrain.kernels.vocabulary import oracle, tiles
from posttrain.kernels.vocabulary.op import BETA, DivergenceGradients, DivergenceKind
from rollouts.logprobs import sampler_logprobs
from tests.triton_kit import BOUNDS, DEVICE, assert_agrees, assert_close, normal, running

FP32, BF16 = torch.float32, torch.bfloat16
KINDS: list[tuple[DivergenceKind, float | None]] = [
    ("reverse_kl", None),
    ("forward_kl", None),
    ("jsd", None),
    ("jsd", 0.1),
]
PATHS: list[Backend] = ["triton", "compiled"] if DEVICE.type == "cpu" else ["triton"]
VALUE = 1e-4
"""Largest error of a divergence against fp64, relative to it: of the fp32 sums, whatever the dtype of the inputs."""

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([FP32, BF16])
temperatures = st.sampled_from([1.0, 0.7])
examples = settings(max_examples=12, deadline=None, derandomize=True)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs_of(tokens: int, vocabulary: int, width: int = 24, other: int = 40, dtype: torch.dtype = FP32) -> Inputs:
    """Student's states and head, teacher's states and head; logits spread by about 2."""
    shapes = (tokens, width), (vocabulary, width), (tokens, other), (vocabulary, other)
    scales = 1.0, 2 * width**-0.5, 1.0, 2 * other**-0.5
    return tuple(normal(*shape, scale=scale).to(dtype) for shape, scale in zip(shapes, scales, strict=True))


def tokens_of(count: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (count,)).to(DEVICE)


def dense_divergence(inputs: Inputs, beta: float, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In fp64: divergence, both entropies and the agreement."""
    student_NH, head_VH, teacher_NG, teacher_head_VG = (tensor.double() for tensor in inputs)
    log_p_NV = oracle.log_softmax(student_NH, head_VH, temperature)
    log_q_NV = oracle.log_softmax(teacher_NG, teacher_head_VG, temperature)
    entropies = (-(log_NV.exp() * log_NV).sum(-1) for log_NV in (log_p_NV, log_q_NV))
    return oracle.divergence(log_p_NV, log_q_NV, beta), *entropies, log_p_NV.argmax(-1) == log_q_NV.argmax(-1)


def leaves(inputs: Inputs) -> Inputs:
    student_NH, head_VH, *teacher = (tensor.detach().clone() for tensor in inputs)
    return student_NH.requires_grad_(), head_VH.requires_grad_(), *teacher


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A few tokens to a tile, a few tiles to a group."""
    for budget in ("LOGIT_BYTES", "DIVERGENCE_BYTES"):
        monkeypatch.setattr(tiles, budget, dict.fromkeys(("cpu", "cuda"), 8 * 320 * 3))
    monkeypatch.setattr(tiles, "GRADIENT_BYTES", 4 * 320 * 10)
    return None


@examples
@given(
    seeds,
    dtypes,
    temperatures,
    st.sampled_from([0, 1, 7, 130]),
    st.sampled_from([1, 43, 300, 1024, 1500]),
    st.integers(1, 70),
)
def test_logprob_and_entropy_are_those_of_dense_logits(
    seed: int, dtype: torch.dtype, temperature: float, tokens: int, vocabulary: int, width: int
) -> None:
    torch.manual_seed(seed)
    tokens_N = tokens_of(tokens, vocabulary)
    inputs = normal(tokens, width), normal(vocabulary, width, scale=2 * width**-0.5)
    assert_agrees(
        lambda *models: linear_logprob(*models, tokens_N, temperature),
        lambda *models: oracle.linear_logprob(*models, tokens_N, temperature),
        *inputs,
        dtype=dtype,
    )


@examples
@given(
    *(seeds, dtypes, temperatures, st.sampled_from(KINDS), st.sampled_from([0, 1, 9])),
    *(st.sampled_from([1, 43, 300, 2500]), st.integers(1, 70), st.integers(1, 70)),
)
def test_divergences_are_those_of_dense_logits(
    seed: int,
    dtype: torch.dtype,
    temperature: float,
    kind: tuple[DivergenceKind, float | None],
    tokens: int,
    vocabulary: int,
    width: int,
    other: int,
) -> None:
    torch.manual_seed(seed)
    *student, teacher_NG, teacher_head_VG = inputs_of(tokens, vocabulary, width, other, dtype)
    teacher, (name, beta) = (teacher_NG, teacher_head_VG), kind
    assert_agrees(
        lambda *models: linear_divergence(name, *models, *teacher, temperature, beta)[0],
        lambda *models: dense_divergence((*models, *teacher), BETA[name] if beta is None else beta, temperature)[0],
        *student,
        dtype=dtype,
    )


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("vocabulary", [300, 16384 + 2050])  # within a span, and across two
def test_values_are_exact_to_fp32_in_either_dtype(
    kind: DivergenceKind, beta: float | None, dtype: torch.dtype, vocabulary: int
) -> None:
    torch.manual_seed(0)
    inputs = inputs_of(4, vocabulary, dtype=dtype)
    expected_N, of_student_N, of_teacher_N, _ = dense_divergence(inputs, BETA[kind] if beta is None else beta)
    for path in PATHS:
        with running(path):
            value_N, entropy_N = linear_divergence(kind, *inputs, beta=beta)
            found = divergence_gradients(kind, *inputs, torch.ones(4, device=DEVICE), beta=beta)
        assert value_N.dtype is entropy_N.dtype is FP32
        assert ((value_N - expected_N).abs() < VALUE * expected_N).all()
        for entropies_N in (entropy_N, found.student_entropy_N):
            assert ((entropies_N - of_student_N).abs() < VALUE * of_student_N).all()
        assert ((found.teacher_entropy_N - of_teacher_N).abs() < VALUE * of_teacher_N).all()
        assert torch.equal(found.divergence_N, value_N)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gradients_in_one_go_are_those_of_autograd(
    path: Backend, kind: DivergenceKind, beta: float | None, dtype: torch.dtype, small_tiles: None
) -> None:
    torch.manual_seed(0)
    inputs = inputs_of(12, 300, dtype=dtype)
    weights_N = torch.rand(12).to(DEVICE)
    tracked = leaves(inputs)
    with running(path):
        (linear_divergence(kind, *tracked, 0.7, beta)[0] * weights_N).sum().backward()
        found = divergence_gradients(kind, *inputs, weights_N, 0.7, beta)
        total_VH = torch.ones(300, 24, device=DEVICE)
        added = divergence_gradients(kind, *inputs, weights_N, 0.7, beta, total_VH)
    wide = tuple(tensor.double() for tensor in inputs)
    exact = divergence_gradients(kind, *wide, weights_N.double(), 0.7, beta)
    assert added.head_gradient_VH is total_VH
    assert_close(total_VH - 1, exact.head_gradient_VH, BOUNDS[dtype], "added to a total")
    for states, head in (tracked[:2], (found.student_gradient_NH, found.head_gradient_VH)):
        by_states, by_head = (one.grad if one.requires_grad else one for one in (states, head))
        assert by_states.dtype is by_head.dtype is dtype
        assert_close(by_states, exact.student_gradient_NH, BOUNDS[dtype], "hidden states")
        assert_close(by_head, exact.head_gradient_VH, BOUNDS[dtype], "head")
    assert torch.equal(found.same_top_N, exact.same_top_N)


@pytest.mark.parametrize("path", PATHS)
def test_tiles_and_groups_change_no_result(path: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs, tokens_N, weights_N = inputs_of(25, 300), tokens_of(25, 300), torch.rand(25).to(DEVICE)

    def everything() -> list[Tensor]:
        tracked, other = leaves(inputs), leaves(inputs)
        with running(path):
            values_N, entropies_N = linear_divergence("jsd", *tracked)
            (values_N * weights_N).sum().backward()
            logprobs_N, _ = linear_logprob(*other[:2], tokens_N)
            (logprobs_N * weights_N).sum().backward()
            found = divergence_gradients("reverse_kl", *inputs, weights_N)
        return [values_N, entropies_N, logprobs_N, *(one.grad for one in (*tracked[:2], *other[:2])), *found]

    whole = everything()
    for tile, group in ((5, 24), (30, 7), (1, 100)):
        for budget in ("LOGIT_BYTES", "DIVERGENCE_BYTES"):
            monkeypatch.setattr(tiles, budget, dict.fromkeys(("cpu", "cuda"), 8 * 320 * tile))
        monkeypatch.setattr(tiles, "GRADIENT_BYTES", 4 * 320 * group)
        for number, (actual, expected) in enumerate(zip(everything(), whole, strict=True)):
            assert_close(actual.float(), expected.float(), BOUNDS[FP32], f"{tile}, {group}: {number}")


def test_budgets_are_kept_at_the_size_of_v4() -> None:
    device = torch.device("cuda")
    assert tiles.tile_tokens(129_280, device) == 384
    assert tiles.tile_tokens(129_280, device, divergence=True) == 768
    assert tiles.group_tokens(8192, 129_280, BF16) == 8192
    assert tiles.group_tokens(8193, 129_280, BF16) == 4096
    assert tiles.group_tokens(100_000, 129_280, FP32) == 2048


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("vocabulary", [43, 1100])
def test_a_logprob_depends_on_no_other_token(path: Backend, dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(0)
    hidden_NH, head_VH, *_ = inputs_of(140, vocabulary, dtype=dtype)
    tokens_N, order = tokens_of(140, vocabulary), torch.randperm(140).to(DEVICE)
    with running(path):
        whole = linear_logprob(hidden_NH, head_VH, tokens_N, 0.7)
        again = linear_logprob(hidden_NH, head_VH, tokens_N, 0.7)
        moved = linear_logprob(hidden_NH[order], head_VH, tokens_N[order], 0.7)
        tracked = linear_logprob(hidden_NH.clone().requires_grad_(), head_VH, tokens_N, 0.7)
        alone = [linear_logprob(hidden_NH[n : n + 1], head_VH, tokens_N[n : n + 1], 0.7) for n in range(0, 140, 35)]
        parts = [linear_logprob(hidden_NH[a:b], head_VH, tokens_N[a:b], 0.7) for a, b in ((0, 3), (3, 140))]
    for which, expected_N in enumerate(whole):
        assert torch.equal(again[which], expected_N)
        assert torch.equal(moved[which], expected_N[order])
        assert torch.equal(tracked[which], expected_N)
        assert torch.equal(torch.cat([one[which] for one in alone]), expected_N[::35])
        assert torch.equal(torch.cat([one[which] for one in parts]), expected_N)


ROUNDED: list[tuple[Backend, torch.dtype]] = [("triton", FP32), ("triton", BF16), ("compiled", FP32)]
"""The CPU's kernels compute in fp32 whatever comes."""


@pytest.mark.parametrize(("path", "dtype"), [one for one in ROUNDED if one[0] in PATHS])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rounded_logprobs_are_the_samplers_bit_for_bit(path: Backend, dtype: torch.dtype, temperature: float) -> None:
    torch.manual_seed(0)
    hidden_NH, head_VH, *_ = inputs_of(12, 300, dtype=dtype)
    tokens_N = tokens_of(12, 300)
    with running(path):
        whole_N = linear_logprob(hidden_NH, head_VH, tokens_N, temperature, rounded=True)[0]
        logits = [linear(hidden_NH[n : n + 1], head_VH) for n in range(12)]
        never_N = linear_logprob(hidden_NH, head_VH, tokens_N, temperature)[0]
    alone = [sampler_logprobs(one, tokens_N[n : n + 1], temperature) for n, one in enumerate(logits)]
    assert torch.equal(whole_N, torch.cat(alone))
    assert_close(whole_N, never_N, 1e-5 if dtype is FP32 else 1e-2, "unrounded")


@pytest.mark.parametrize(("path", "dtype"), [one for one in ROUNDED if one[0] in PATHS])
def test_rounded_logprobs_have_the_gradients_of_dense_rounded_logits(
    path: Backend, dtype: torch.dtype, small_tiles: None
) -> None:
    torch.manual_seed(0)
    inputs, tokens_N, weights_N = inputs_of(12, 300, dtype=dtype)[:2], tokens_of(12, 300), torch.rand(12).to(DEVICE)
    tracked = [one.detach().clone().requires_grad_() for one in inputs]
    hidden_NH, head_VH = double = [one.detach().double().requires_grad_() for one in inputs]
    with running(path):
        logprob_N, entropy_N = linear_logprob(*tracked, tokens_N, 0.7, rounded=True)
        (logprob_N * weights_N + entropy_N).sum().backward()
        rounded_NV = linear(*inputs)
    logits_NV = hidden_NH @ head_VH.T
    logits_NV = logits_NV + (rounded_NV - logits_NV).detach()
    log_p_NV = (logits_NV / 0.7).log_softmax(-1)
    exact_N = log_p_NV.gather(1, tokens_N[:, None]).squeeze(1)
    (exact_N * weights_N - (log_p_NV.exp() * log_p_NV).sum(-1)).sum().backward()
    for one, other in zip(tracked, double, strict=True):
        assert one.grad is not None and other.grad is not None
        assert_close(one.grad, other.grad, BOUNDS[dtype], "gradient")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_equal_calls_give_equal_bits(path: Backend, dtype: torch.dtype, small_tiles: None) -> None:
    torch.manual_seed(0)
    inputs, tokens_N, weights_N = inputs_of(12, 300, dtype=dtype), tokens_of(12, 300), torch.rand(12).to(DEVICE)

    def gradients() -> list[Tensor]:
        tracked, other = leaves(inputs), leaves(inputs)
        with running(path):
            (linear_divergence("jsd", *tracked)[0] * weights_N).sum().backward()
            sum(linear_logprob(*other[:2], tokens_N)).sum().backward()
            return [*(one.grad for one in (*tracked[:2], *other[:2])), *divergence_gradients("jsd", *inputs, weights_N)]

    assert all(torch.equal(one, other) for one, other in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_a_teacher_equal_to_the_student_teaches_nothing(
    path: Backend, kind: DivergenceKind, beta: float | None
) -> None:
    torch.manual_seed(0)
    student_NH, head_VH, *_ = inputs_of(9, 300)
    with running(path):
        found = divergence_gradients(
            kind, student_NH, head_VH, student_NH, head_VH, torch.ones(9, device=DEVICE), beta=beta
        )
    assert found.divergence_N.abs().max() < 1e-6
    assert found.student_gradient_NH.abs().max() < 1e-6
    assert found.same_top_N.all()
    assert torch.equal(found.student_entropy_N, found.teacher_entropy_N)


@pytest.mark.parametrize("path", PATHS)
def test_of_equally_likely_tokens_the_lowest_is_the_top(path: Backend) -> None:
    """Logits are columns of the identity: a tie is one to the bit."""
    student_NV, teacher_NV = torch.zeros(3, 20_000), torch.zeros(3, 20_000)
    student_NV[0, [5, 1029, 17_000]] = teacher_NV[0, [5, 18_000]] = 3.0
    student_NV[1, [1029, 17_000]] = teacher_NV[1, 17_000] = 3.0
    models = (student_NV.T.contiguous(), teacher_NV.T.contiguous())
    identity, weights_N = torch.eye(3), torch.zeros(3)
    arguments = (one.to(DEVICE) for one in (identity, models[0], identity, models[1], weights_N))
    with running(path):
        found = divergence_gradients("reverse_kl", *arguments)
    assert found.same_top_N.tolist() == [True, False, True]


@pytest.mark.parametrize("path", PATHS)
def test_extreme_logits_give_finite_results(path: Backend) -> None:
    torch.manual_seed(0)
    inputs = tuple(30 * tensor for tensor in inputs_of(6, 300))
    tokens_N = tokens_of(6, 300)
    for kind, beta in KINDS:
        tracked = leaves(inputs)
        with running(path):
            values_N, entropies_N = linear_divergence(kind, *tracked, beta=beta)
            values_N.sum().backward()
            logprob_N, other_N = linear_logprob(*tracked[:2], tokens_N)
        expected = dense_divergence(inputs, BETA[kind] if beta is None else beta)
        for actual, wanted in ((values_N, expected[0]), (entropies_N, expected[1]), (other_N, expected[1])):
            assert_close(actual, wanted, 1e-5, kind)
        assert all(one.isfinite().all() for one in (logprob_N, *(leaf.grad for leaf in tracked[:2])))


@pytest.mark.parametrize("path", PATHS)
def test_a_head_in_fp32_serves_states_in_bf16(path: Backend) -> None:
    torch.manual_seed(0)
    student_NH, head_VH, teacher_NG, teacher_head_VG = inputs_of(9, 300)
    inputs = student_NH.bfloat16(), head_VH, teacher_NG.bfloat16(), teacher_head_VG
    tracked, tokens_N = leaves(inputs), tokens_of(9, 300)
    with running(path):
        linear_divergence("reverse_kl", *tracked)[0].sum().backward()
        linear_logprob(*tracked[:2], tokens_N)[0].sum().backward()
    assert tracked[0].grad.dtype is BF16
    assert tracked[1].grad.dtype is FP32


@pytest.mark.parametrize("path", PATHS)
def test_gradients_come_only_where_they_are_asked_for(path: Backend) -> None:
    torch.manual_seed(0)
    for place in range(2):
        inputs = inputs_of(9, 300)
        inputs[place].requires_grad_()
        for teacher in inputs[2:]:
            teacher.requires_grad_()
        with running(path):
            values_N, entropies_N = linear_divergence("reverse_kl", *inputs)
            (values_N.sum() + linear_logprob(*inputs[:2], tokens_of(9, 300))[1].sum()).backward()
        assert not entropies_N.requires_grad
        assert [one.grad is None for one in inputs] == [index != place for index in range(4)]


@pytest.mark.skipif(trl_file() is None, reason="TRL is not installed here")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_values_and_gradients_are_trls(path: Backend, kind: DivergenceKind, beta: float | None) -> None:
    torch.manual_seed(0)
    file = trl_file()
    assert file is not None
    theirs_module, _ = trl_kernels(file)
    ours = leaves(inputs_of(7, 300))
    theirs = leaves(ours)
    with running(path):
        value_N, entropy_N = linear_divergence(kind, *ours, 0.7, beta)
    student_NH, head_VH, teacher_NG, teacher_head_VG = theirs
    expected_N, expected_entropy_N = theirs_module.ChunkedDivergenceFunction.apply(
        *(student_NH, head_VH, None, teacher_NG, teacher_head_VG, None),
        *(BETA[kind] if beta is None else beta, 0.7),
    )
    assert_close(value_N, expected_N, BOUNDS[FP32], "divergence")
    assert_close(entropy_N, expected_entropy_N, BOUNDS[FP32], "entropy")
    slopes_N = torch.rand(7).to(DEVICE)
    (value_N * slopes_N).sum().backward()
    (expected_N * slopes_N).sum().backward()
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert_close(one.grad, other.grad, BOUNDS[FP32], "gradient")


Call = Callable[..., tuple[Tensor, ...] | DivergenceGradients]
GOOD: dict[str, Any] = {
    "student_NH": torch.zeros(3, 4),
    "student_head_VH": torch.zeros(7, 4),
    "teacher_NG": torch.zeros(3, 5),
    "teacher_head_VG": torch.zeros(7, 5),
}
LOGPROB: dict[str, Any] = {
    "hidden_NH": torch.zeros(3, 4),
    "head_VH": torch.zeros(7, 4),
    "tokens_N": torch.zeros(3, dtype=torch.long),
}


@pytest.mark.parametrize(
    ("op", "wrong", "message"),
    [
        (linear_divergence, {"kind": "kl"}, r"kind is 'kl'; expected one of reverse_kl, forward_kl, jsd"),
        (linear_divergence, {"beta": 0.5}, r"beta is 0.5 for reverse_kl; expected .* jsd only"),
        (
            linear_divergence,
            {"kind": "jsd", "beta": 1.0},
            r"beta is 1.0 for jsd; expected a number above 0 and below 1",
        ),
        (linear_divergence, {"temperature": 0.0}, r"temperature is 0.0; expected a number above 0"),
        (
            linear_divergence,
            {"student_head_VH": torch.zeros(7, 3)},
            r"student_head has shape \[7, 3\]; expected \[V, 4\]",
        ),
        (linear_divergence, {"teacher_NG": torch.zeros(2, 5)}, r"teacher has shape \[2, 5\]; expected \[3, G\]"),
        (
            linear_divergence,
            {"teacher_head_VG": torch.zeros(6, 5)},
            r"teacher_head has shape \[6, 5\]; expected \[7, G\]",
        ),
        (
            linear_divergence,
            {"teacher_head_VG": torch.zeros(7, 6)},
            r"teacher_head has shape \[7, 6\]; expected \[V, 5\]",
        ),
        (linear_divergence, {"teacher_NG": torch.zeros(3, 5, device="meta")}, r"is on .*; expected "),
        (
            linear_divergence,
            {"student_NH": torch.zeros(3, 4, dtype=torch.long)},
            r"student is torch.int64; expected a fl",
        ),
        (
            linear_divergence,
            {"student_NH": torch.zeros(3, 4).half()},
            r"student is torch.float16; expected torch.float32",
        ),
        (divergence_gradients, {"weights_N": torch.zeros(2)}, r"weights has shape \[2\]; expected \[3\]"),
        (divergence_gradients, {"head_total_VH": torch.zeros(7, 4).half()}, r"head_total is torch.float16; expected"),
        (linear_logprob, {"tokens_N": torch.zeros(2)}, r"tokens has shape \[2\]; expected \[3\]"),
        (linear_logprob, {"tokens_N": torch.zeros(3)}, r"tokens are torch.float32 on .*; expected torch.int64"),
        (linear_logprob, {"head_VH": torch.zeros(0, 4)}, r"head has shape \[0, 4\]; expected at least one row"),
        (linear_logprob, {"temperature": float("nan")}, r"temperature is nan; expected a number above 0"),
    ],
)
def test_bad_input_is_named_before_any_launch(op: Call, wrong: dict[str, Any], message: str) -> None:
    good = LOGPROB if op is linear_logprob else {"kind": "reverse_kl"} | GOOD
    if op is divergence_gradients:
        good = good | {"weights_N": torch.zeros(3)}
    arguments = {
        name: value.to(DEVICE) if isinstance(value, Tensor) and not value.is_meta else value
        for name, value in (good | wrong).items()
    }
    with running("triton"), pytest.raises(ValueError, match=f"^{op.__name__}: .*{message}"):
        op(**arguments)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="would stop the GPU to look")
def test_a_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens are 0 to 7; expected 0 to 6"):
        linear_logprob(**(LOGPROB | {"tokens_N": torch.tensor([0, 7, 2])}))
