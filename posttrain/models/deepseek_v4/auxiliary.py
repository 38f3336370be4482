"""Training objectives for what the language-model loss does not reach: the indexers, and the routers' balance.

An `Auxiliary` on the backbone (`model.auxiliary`) switches them on. Each forward pass with gradients then opens a
`Record`; layers find it through `recording()` and leave their losses and their experts' loads in it. A layer whose
forward is run again in a backward pass (gradient checkpointing) finds the same record, closed: it does the same work
and nothing is counted twice. Equations: docs/auxiliary.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain import kernels
from posttrain.kernels.wide import wide

if TYPE_CHECKING:
    from posttrain.models.deepseek_v4.context import PackedContext
    from posttrain.models.deepseek_v4.model import DeepseekV4Model

Store = tuple[Tensor, Tensor]
"""Entries `[S, D]` and int64 rows `[T, K]` into them, -1 for none, as `kernels.sparse_attention` takes them."""

GATHERED = 1 << 25
"""Elements that `attention_target` gathers at once."""


@dataclass
class Record:
    """What the layers of one forward pass leave. A layer that comes again (checkpointing) does not count again."""

    indexer: bool
    """Whether indexers are trained."""
    all_candidates: bool
    """Compare over all candidates (V3.2's dense warm-up), not over the chosen ones."""
    balance: bool
    lengths_B: list[int]
    """Of the packed sequences."""
    closed: bool = False
    divergences: dict[str, Tensor] = field(default_factory=dict)
    balances: dict[int, Tensor] = field(default_factory=dict)
    loads: dict[int, Tensor] = field(default_factory=dict)

    def add_divergence(self, name: str, loss: Tensor) -> None:
        """The KL divergence of the indexer `name`."""
        if not self.closed:
            self.divergences[name] = loss

    def add_routing(self, layer: int, x_TH: Tensor, weight_EH: Tensor, experts_TK: Tensor) -> None:
        """A router's choice: its load is counted, and its balance loss taken where that is asked for."""
        if self.balance:
            loss = sequence_balance(router_scores(x_TH, weight_EH), experts_TK.shape[1], self.lengths_B)
            if not self.closed:
                self.balances[layer] = loss
        if not self.closed:
            self.loads[layer] = torch.bincount(experts_TK.flatten(), minlength=len(weight_EH))


_current: ContextVar[Record | None] = ContextVar("record", default=None)


def recording() -> Record | None:
    """The record of the forward pass that is under way; None when no objective is on."""
    return _current.get()


def run_layer(record: Record | None, layer: Callable[..., Tensor], *args: Any) -> Tensor:
    """`layer(*args)`, with `record` for it to be found; what is checkpointed, so that recomputation finds it too."""
    if record is None:
        return layer(*args)
    token = _current.set(record)
    try:
        return layer(*args)
    finally:
        _current.reset(token)


@dataclass
class Auxiliary:
    """The objectives that are on, and what has come in for them since they were last taken.

    Give it to `DeepseekV4Model.auxiliary`. A training loop adds `take_loss()` to its loss, and calls `update_biases`
    after each optimizer step.
    """

    indexer: float = 0.0
    """Weight of the indexers' divergence; 0: no gradient reaches them."""
    balance: float = 0.0
    """Weight of the sequence-wise balance loss."""
    bias_update: float = 0.0
    """Step of the router biases, V4's gamma; 0: frozen."""
    all_candidates: bool = False
    """Train indexers over all candidates (dense warm-up), not over the chosen ones."""
    _losses: list[tuple[Tensor, dict[str, float]]] = field(default_factory=list)
    _loads: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def record(self, context: PackedContext) -> Iterator[Record]:
        """Around the layers of one forward pass; what they leave is kept for `take_loss` and `update_biases`."""
        lengths_B = context.lengths_B.tolist() if self.balance else []
        record = Record(self.indexer > 0, self.all_candidates, self.balance > 0, lengths_B)
        try:
            yield record
            self._keep(record)
        finally:
            record.closed = True
            # A checkpointed layer's graph holds the record: it must not hold the graph.
            record.divergences, record.balances = {}, {}

    def _keep(self, record: Record) -> None:
        for layer, load_E in record.loads.items():
            self._loads[layer] = self._loads[layer] + load_E if layer in self._loads else load_E
        weighted, means = [], {}
        kinds = (("indexer_kl", self.indexer, record.divergences), ("balance_loss", self.balance, record.balances))
        for name, weight, losses in kinds:
            if losses:
                total = torch.stack([*losses.values()]).sum()
                weighted.append(weight * total)
                means[name] = total.item() / len(losses)
        if weighted:
            self._losses.append((torch.stack(weighted).sum(), means))

    def take_loss(self) -> tuple[Tensor | None, dict[str, float]]:
        """What to add to the loss, weighted, and each part's unweighted mean over layers; both over the forward passes
        since the last call. None when there was none, or no objective that has a loss."""
        losses, self._losses = self._losses, []
        if not losses:
            return None, {}
        means = {name: sum(part[name] for _, part in losses) / len(losses) for name in losses[0][1]}
        return torch.stack([loss for loss, _ in losses]).mean(), means

    @torch.no_grad()
    def update_biases(self, model: DeepseekV4Model) -> dict[int, Tensor]:
        """`bias += gamma · sign(mean load - load)` in every router that has a bias (V3 §2.1.2), by the loads of the
        forward passes since the last call, in all processes.

        Returns:
            Those loads, `[E]` int64 for each layer: how many tokens each expert got.
        """
        loads, self._loads = self._loads, {}
        for layer, load_E in loads.items():
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(load_E)
            if self.bias_update:
                bias_E = model.layers[layer].ffn.gate.bias
                # Times the number of experts: whole numbers, so that an exactly mean load moves nothing.
                bias_E += self.bias_update * torch.sign(load_E.sum() - load_E * len(load_E)).to(bias_E.dtype)
        return loads


def indexer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all indexers, their compressors included."""
    return [parameter for name, parameter in model.named_parameters() if ".indexer." in name]


def _in_full_precision(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Without autocast: softmaxes, sums over tokens and router scores stay in fp32."""

    @wraps(function)
    def run(first: Tensor, *args: Any) -> Tensor:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return run


def _logits(q_THD: Tensor, store: Store, scale: float) -> Tensor:
    entries_SD, rows_TK = store
    entries_TKD = wide(entries_SD[rows_TK.clamp(min=0)])
    return (wide(q_THD) @ entries_TKD.transpose(1, 2) * scale).masked_fill((rows_TK < 0).unsqueeze(1), -torch.inf)


@torch.no_grad()
@_in_full_precision
def attention_target(q_THD: Tensor, window: Store, compressed: Store, sink_H: Tensor, scale: float) -> Tensor:
    """`p[t, k]`: the attention that token t pays to its compressed entries, summed over heads, L1-normalised over them.

    Each head's weights are those of `kernels.sparse_attention` over window, entries and sink. No gradient.

    Args:
        q_THD: the main attention's queries.
        window, compressed: its two sources; `p` is over the columns of the second.
        sink_H: its sinks.
        scale: its softmax scale.

    Returns:
        `[T, K]` in fp32 (fp64 for fp64), 0 where there is no entry; all 0 for a token that has none.
    """
    tokens, _, dim = q_THD.shape
    columns = window[1].shape[1] + compressed[1].shape[1]
    step = max(1, GATHERED // max(1, columns * dim))
    target_TK = wide(q_THD).new_zeros(compressed[1].shape)
    for first in range(0, tokens, step):
        part = slice(first, first + step)
        q_PHD = q_THD[part]
        near_PHW = _logits(q_PHD, (window[0], window[1][part]), scale)
        far_PHK = _logits(q_PHD, (compressed[0], compressed[1][part]), scale)
        sink_PH1 = wide(sink_H).expand(len(q_PHD), -1).unsqueeze(-1)
        total_PH1 = torch.cat((near_PHW, far_PHK, sink_PH1), -1).logsumexp(-1, keepdim=True)
        # In logarithms: entries far below window and sink would all underflow to a total of 0.
        present_P1 = (compressed[1][part] >= 0).any(-1, keepdim=True)
        target_TK[part] = (far_PHK - total_PH1).logsumexp(1).softmax(-1).masked_fill(~present_P1, 0.0)
    return target_TK


@_in_full_precision
def indexer_loss(q_THD: Tensor, weights_TH: Tensor, keys_SD: Tensor, rows_TK: Tensor, target_TK: Tensor) -> Tensor:
    """`mean over t of KL(p_t || softmax(I_t))`, the indexer objective of V3.2 (eqs. 3 and 4), in nats.

    Args:
        q_THD, weights_TH, keys_SD: the indexer's, as `kernels.index_scores` takes them; they get the gradient.
        rows_TK: int64 candidates, -1 for none.
        target_TK: `p`, a distribution over each token's candidates.

    Returns:
        A scalar, the mean over the tokens that have a candidate; 0 when none has.
    """
    scores_TK = kernels.index_scores(q_THD, weights_TH, keys_SD, rows_TK)
    present = (rows_TK >= 0).any(-1).sum().clamp(min=1)
    return kernels.index_divergence(scores_TK, target_TK).sum() / present


@_in_full_precision
def router_scores(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """`sqrt(softplus(x·wᵀ))` `[T, E]`: a router's affinities, before its bias."""
    softplus_TE = nn.functional.softplus(kernels.linear(wide(x_TH), wide(weight_EH)))
    return softplus_TE.clamp(min=torch.finfo(softplus_TE.dtype).tiny).sqrt()  # the root of 0 has no gradient


@_in_full_precision
def sequence_balance(scores_TE: Tensor, k: int, lengths_B: list[int]) -> Tensor:
    """Mean over sequences of `sum_i f_i P_i` (V3 eqs. 17-20): 1 when affinities are even, up to `E / k` when not.

    `f_i` is the share of the sequence's tokens with expert i among their `k` highest affinities (without the bias),
    times `E / k`; `P_i` the mean of i's affinity after normalising each token's to sum to 1. `P` gets the gradient.

    Args:
        scores_TE: affinities, positive.
        lengths_B: tokens of each sequence, in packed order; empty ones do not count.
    """
    experts = scores_TE.shape[1]
    shares_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    chosen_TK = kernels.topk_stable(scores_TE.detach(), k)
    chosen_TE = torch.zeros_like(shares_TE).scatter_(1, chosen_TK, experts / k)
    # Sequence after sequence: sums in a fixed order, where a scattered sum would use atomics.
    parts = zip(chosen_TE.split(lengths_B), shares_TE.split(lengths_B), strict=True)
    losses = [(f_LE.mean(0) * p_LE.mean(0)).sum() for f_LE, p_LE in parts if len(p_LE)]
    return torch.stack(losses).mean() if losses else shares_TE.sum()
