"""What is computed from hidden states and a head over the whole vocabulary, without the `[N, V]` logits.

`linear_logprob` is the log-probability of sampled tokens, `linear_divergence` the distance of a student from a teacher.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from posttrain.kernels.backend import backend_of
from posttrain.kernels.checks import expect
from posttrain.kernels.compiled import Kernels, dense, differentiable
from posttrain.kernels.vocabulary import oracle, plain
from posttrain.kernels.vocabulary.divergence import Divergence, Models, summary_and_gradients
from posttrain.kernels.vocabulary.form import Form, Summary
from posttrain.kernels.vocabulary.logprob import LogProb, OnCpu

triton = Kernels(__package__, "triton")

DivergenceKind = Literal["reverse_kl", "forward_kl", "jsd"]
BETA: dict[DivergenceKind, float] = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}
"""The divergence as a member of the generalised Jensen-Shannon family, mixture m = (1 - beta) p + beta q."""

TRITON_DTYPES = (torch.float32, torch.bfloat16)


def linear_logprob(
    hidden_NH: Tensor, head_VH: Tensor, tokens_N: Tensor, temperature: float = 1.0, rounded: bool = False
) -> tuple[Tensor, Tensor]:
    """`log softmax(hidden · headᵀ / temperature)` at one token of each row, and the entropy of each row, in nats.

    A row is bitwise the same in every call, alone or among others: a sampler and a trainer that both call this on
    equal states and heads report equal numbers. Logits are not rounded below fp32 unless `rounded` asks for it.

    Args:
        hidden_NH: `[N, H]`, last hidden states after the final norm.
        head_VH: `[V, H]`; converted to the states' dtype where it has another.
        tokens_N: `[N]`, int64, each in `[0, V)`.
        temperature: above 0.
        rounded: from logits in the states' dtype, by the operations of vLLM's sampler: exactly what an engine with
            this op table reports for a token that it sampled, in any dtype. (The entropy's last bits may then depend on
            the number of rows.)

    Returns:
        Log-probability and entropy, `[N]`, fp32. Both have gradients in hidden states and head.

    Raises:
        ValueError: a shape, dtype, device, temperature or (on the CPU) token that is not allowed.
    """
    op = "linear_logprob"
    vocabulary = _expect_model(op, "hidden", hidden_NH, "head", head_VH)
    _expect_temperature(op, temperature)
    expect(op, "tokens", tokens_N, len(hidden_NH))
    if tokens_N.dtype is not torch.int64 or tokens_N.device != hidden_NH.device:
        raise ValueError(
            f"{op}: tokens are {tokens_N.dtype} on {tokens_N.device}; expected torch.int64 on {hidden_NH.device}"
        )
    if tokens_N.is_cpu and len(tokens_N) and not 0 <= int(tokens_N.min()) <= int(tokens_N.max()) < vocabulary:
        raise ValueError(
            f"{op}: tokens are {int(tokens_N.min())} to {int(tokens_N.max())}; expected 0 to {vocabulary - 1}"
        )
    backend = backend_of(hidden_NH)
    if backend == "oracle":
        return oracle.linear_logprob(hidden_NH, head_VH, tokens_N, temperature)
    if backend == "compiled":
        hidden_NH, head_VH = dense(hidden_NH), dense(head_VH)
    else:
        _expect_triton(op, "hidden", hidden_NH)
    kernels = OnCpu if backend == "compiled" else triton
    inputs = hidden_NH.contiguous(), head_VH.contiguous(), tokens_N.contiguous()
    return differentiable(LogProb, *inputs, temperature, kernels, rounded)


def linear_divergence(
    kind: DivergenceKind,
    student_NH: Tensor,
    student_head_VH: Tensor,
    teacher_NG: Tensor,
    teacher_head_VG: Tensor,
    temperature: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergence of the student p from the teacher q, and the student's entropy, for each token, in nats.

    With p = softmax(student · headᵀ / temperature) and q likewise:

        reverse_kl    KL(p ‖ q) = sum_v p_v (log p_v - log q_v)
        forward_kl    KL(q ‖ p)
        jsd           (1 - beta) KL(p ‖ m) + beta KL(q ‖ m),    m = (1 - beta) p + beta q

    Args:
        kind: which.
        student_NH: `[N, H]`, last hidden states after the final norm.
        student_head_VH: `[V, H]`.
        teacher_NG: `[N, G]`, of the same tokens; another width and dtype are allowed.
        teacher_head_VG: `[V, G]`.
        temperature: above 0, of both.
        beta: for `jsd` only, above 0 and below 1; 0.5 if not given.

    Returns:
        Two tensors `[N]`, fp32. The divergence has gradients in the student's states and head, the entropy none.

    Raises:
        ValueError: a shape, dtype, device, temperature or beta that is not allowed.
    """
    op, inputs = "linear_divergence", (student_NH, student_head_VH, teacher_NG, teacher_head_VG)
    backend, beta = _expect_divergence(op, kind, inputs, temperature, beta)
    if backend == "oracle":
        log_p_NV = oracle.log_softmax(student_NH, student_head_VH, temperature)
        log_q_NV = oracle.log_softmax(teacher_NG.detach(), teacher_head_VG.detach(), temperature)
        entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1).detach()
        return oracle.divergence(log_p_NV, log_q_NV, beta), entropy_N
    student_NH, student_head_VH, teacher_NG, teacher_head_VG = _ready(backend, inputs)
    form = Form(plain if backend == "compiled" else triton, beta, 1 / temperature, metrics=False)
    teacher = teacher_NG.detach(), teacher_head_VG.detach()
    return differentiable(Divergence, student_NH, student_head_VH, *teacher, form)


class DivergenceGradients(NamedTuple):
    """A divergence of each token, what else the same pass sees, and the gradients of the weighted sum."""

    divergence_N: Tensor
    """Nats, fp32, like the entropies."""
    student_entropy_N: Tensor
    teacher_entropy_N: Tensor
    same_top_N: Tensor
    """Whether both models prefer the same token (the lowest on a tie); bool."""
    student_gradient_NH: Tensor
    """Of `sum(weights · divergence)`, in the student's dtype."""
    head_gradient_VH: Tensor
    """In the head's dtype; or the tensor that it was added to."""


def divergence_gradients(
    kind: DivergenceKind,
    student_NH: Tensor,
    student_head_VH: Tensor,
    teacher_NG: Tensor,
    teacher_head_VG: Tensor,
    weights_N: Tensor,
    temperature: float = 1.0,
    beta: float | None = None,
    head_total_VH: Tensor | None = None,
) -> DivergenceGradients:
    """`linear_divergence` and the gradients of `sum(weights · divergence)`, at once and outside autograd.

    Where the weight of each token in the loss is known beforehand, this is the cheapest form for any number of
    tokens: logits are computed once, and nothing the size of the vocabulary is kept but the head's gradient.

    Args:
        kind, student_NH, student_head_VH, teacher_NG, teacher_head_VG, temperature, beta: as in `linear_divergence`.
        weights_N: `[N]`, fp32.
        head_total_VH: `[V, H]`, fp32; the head's gradient is added to it, in place (several teachers, one head).

    Raises:
        ValueError: as in `linear_divergence`.
    """
    op, inputs = "divergence_gradients", (student_NH, student_head_VH, teacher_NG, teacher_head_VG)
    backend, beta = _expect_divergence(op, kind, inputs, temperature, beta)
    expect(op, "weights", weights_N, len(student_NH))
    if head_total_VH is not None:
        expect(op, "head_total", head_total_VH, *student_head_VH.shape)
        if head_total_VH.dtype is not torch.float32 and backend != "oracle":
            raise ValueError(f"{op}: head_total is {head_total_VH.dtype}; expected torch.float32")
    with torch.no_grad():
        if backend == "oracle":
            return _oracle_gradients(inputs, weights_N, temperature, beta, head_total_VH)
        tiles = plain if backend == "compiled" else triton
        models = Models.of(*_ready(backend, inputs))
        form = Form(tiles, beta, 1 / temperature, metrics=True)
        found = summary_and_gradients(models, form, dense(weights_N), student_head_VH, head_total_VH)
        summary_FN, student_gradient_NH, head_gradient_VH = found
        return DivergenceGradients(
            divergence_N=summary_FN[Summary.DIVERGENCE],
            student_entropy_N=summary_FN[Summary.STUDENT_ENTROPY],
            teacher_entropy_N=summary_FN[Summary.TEACHER_ENTROPY],
            same_top_N=summary_FN[Summary.SAME_TOP] > 0,
            student_gradient_NH=student_gradient_NH.to(student_NH.dtype),
            head_gradient_VH=head_gradient_VH,
        )


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _oracle_gradients(
    inputs: Inputs, weights_N: Tensor, temperature: float, beta: float, head_total_VH: Tensor | None
) -> DivergenceGradients:
    student_NH, head_VH = (tensor.detach().requires_grad_() for tensor in inputs[:2])
    with torch.enable_grad():
        log_p_NV = oracle.log_softmax(student_NH, head_VH, temperature)
        log_q_NV = oracle.log_softmax(inputs[2].detach(), inputs[3].detach(), temperature)
        divergence_N = oracle.divergence(log_p_NV, log_q_NV, beta)
        by_student, by_head = torch.autograd.grad((weights_N * divergence_N).sum(), (student_NH, head_VH))
    log_p_NV = log_p_NV.detach()
    of_student_N, of_teacher_N = (-(log_NV.exp() * log_NV).sum(-1) for log_NV in (log_p_NV, log_q_NV))
    same_top_N = log_p_NV.argmax(-1) == log_q_NV.argmax(-1)
    by_head = by_head if head_total_VH is None else head_total_VH.add_(by_head)
    return DivergenceGradients(divergence_N.detach(), of_student_N, of_teacher_N, same_top_N, by_student, by_head)


def _ready(backend: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """The inputs as the tiles take them."""
    if backend == "compiled":
        return tuple(dense(tensor) for tensor in inputs)
    return tuple(tensor.contiguous() for tensor in inputs)


def _expect_divergence(
    op: str, kind: DivergenceKind, inputs: Inputs, temperature: float, beta: float | None
) -> tuple[str, float]:
    """The backend and the beta, once everything has been checked."""
    student_NH, student_head_VH, teacher_NG, teacher_head_VG = inputs
    if kind not in BETA:
        raise ValueError(f"{op}: kind is {kind!r}; expected one of {', '.join(BETA)}")
    if beta is not None and (kind != "jsd" or not 0 < beta < 1):
        raise ValueError(f"{op}: beta is {beta} for {kind}; expected a number above 0 and below 1, for jsd only")
    vocabulary = _expect_model(op, "student", student_NH, "student_head", student_head_VH)
    expect(op, "teacher", teacher_NG, len(student_NH), "G")
    expect(op, "teacher_head", teacher_head_VG, vocabulary, "G")
    _expect_model(op, "teacher", teacher_NG, "teacher_head", teacher_head_VG)
    if teacher_NG.device != student_NH.device:
        raise ValueError(f"{op}: teacher is on {teacher_NG.device}; expected {student_NH.device}, as the student")
    _expect_temperature(op, temperature)
    backend = backend_of(student_NH)
    if backend == "triton":
        _expect_triton(op, "student", student_NH)
        _expect_triton(op, "teacher", teacher_NG)
    return backend, BETA[kind] if beta is None else float(beta)


def _expect_model(op: str, name: str, hidden_NH: Tensor, head_name: str, head_VH: Tensor) -> int:
    """The size of the vocabulary."""
    _, width = expect(op, name, hidden_NH, "N", "H")
    vocabulary, _ = expect(op, head_name, head_VH, "V", width)
    if vocabulary == 0:
        raise ValueError(f"{op}: {head_name} has shape {list(head_VH.shape)}; expected at least one row")
    if head_VH.device != hidden_NH.device:
        raise ValueError(f"{op}: {head_name} is on {head_VH.device}; expected {hidden_NH.device}, as {name}")
    for what, tensor in ((name, hidden_NH), (head_name, head_VH)):
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: {what} is {tensor.dtype}; expected a floating-point tensor")
    return vocabulary


def _expect_temperature(op: str, temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{op}: temperature is {temperature}; expected a number above 0")


def _expect_triton(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in TRITON_DTYPES:
        raise ValueError(f"{op}: {name} is {tensor.dtype}; expected torch.float32 or torch.bfloat16")
