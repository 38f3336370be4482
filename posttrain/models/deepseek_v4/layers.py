"""The layers of DeepSeek-V4 on the op table; parameter names are those of released checkpoints.

Nothing here knows of padding, batches or caches: tokens come packed, and an `AttentionContext` tells where the
earlier ones are. The vLLM plugin runs these very modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from posttrain import kernels
from posttrain.kernels.blocks import round_up
from posttrain.kernels.quant.op import fake_quantize_mxfp4, packed_bytes
from posttrain.models.deepseek_v4.auxiliary import Record, attention_target, indexer_loss, recording
from posttrain.models.deepseek_v4.config import fp4_experts, fp4_indexer, rope_dim
from posttrain.models.deepseek_v4.context import AttentionContext
from posttrain.models.deepseek_v4.presets import SLIDING, SPARSE
from posttrain.models.deepseek_v4.routing import RoutedTokens, given_experts, token_ids


class Linear(nn.Linear):
    """A bias-free linear layer whose rows do not depend on the batch."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return kernels.linear(input.reshape(-1, input.shape[-1]), self.weight).view(*input.shape[:-1], -1)


class GroupedLinear(Linear):
    """Linear layers stacked along the rows, each for its own group of features."""

    def forward(self, input: Tensor) -> Tensor:
        """`[T, groups, in]` to `[T, groups, out]`."""
        return kernels.grouped_linear(input, self.weight.unflatten(0, (input.shape[1], -1)))


class RMSNorm(nn.Module):
    """RMSNorm with a weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return kernels.rms_norm(x, self.weight, self.eps)


@dataclass
class Rope:
    """Angles: full tables `[P, R]` to look positions up in, and those of the tokens at hand, `[T, R]`, all fp32."""

    cos_PR: Tensor
    sin_PR: Tensor
    cos_TR: Tensor
    sin_TR: Tensor

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin at other positions."""
        return self.cos_PR[positions], self.sin_PR[positions]

    def of_tokens(self, part: slice) -> Rope:
        """For some of the tokens."""
        return Rope(self.cos_PR, self.sin_PR, self.cos_TR[part], self.sin_TR[part])


@dataclass
class Past:
    """Where the tokens of one attention layer find earlier ones, and themselves."""

    window_SD: Tensor
    """Keys and values of single tokens."""
    window_rows_TW: Tensor
    """int64 rows of them for each token, -1 for none."""
    entries_SD: Tensor | None = None
    """Compressed keys and values; None in sliding layers."""
    candidates: kernels.Candidates | None = None
    keys_SD: Tensor | None = None
    """The indexer's keys of the same entries; None where there is no indexer."""
    key_candidates: kernels.Candidates | None = None

    def of_tokens(self, part: slice) -> Past:
        """For some of the tokens: the same stores, their own rows."""
        candidates, keys = (
            None if one is None else one.of_tokens(part.start, part.stop)
            for one in (self.candidates, self.key_candidates)
        )
        return replace(self, window_rows_TW=self.window_rows_TW[part], candidates=candidates, key_candidates=keys)


class RopeTables(nn.Module):
    """cos and sin of every position for V4's two rotations: `main` (sliding layers) and `compress` (the others).

    Looked up rather than computed for each call, so that a position's angle has the same bits everywhere.
    """

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__()
        self.config = config
        self.tables: dict[str, tuple[Tensor, Tensor]] = {}

    def _table(self, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
        if kind not in self.tables or self.tables[kind][0].device != device:
            parameters = self.config.rope_parameters[kind]
            if parameters["rope_type"] == "default":
                size = rope_dim(self.config)
                exponent = torch.arange(0, size, 2, dtype=torch.float32) / size
                frequencies = 1.0 / (parameters["rope_theta"] ** exponent)
            else:
                frequencies, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](self.config, None, layer_type=kind)
            positions = torch.arange(self.config.max_position_embeddings, dtype=torch.float32)
            angles = positions.unsqueeze(1) * frequencies
            self.tables[kind] = angles.cos().to(device), angles.sin().to(device)
        return self.tables[kind]

    def forward(self, kind: str, positions_T: Tensor) -> Rope:
        """Angles of one kind for these positions."""
        cos_PR, sin_PR = self._table(kind, positions_T.device)
        return Rope(cos_PR, sin_PR, cos_PR[positions_T], sin_PR[positions_T])


class Compressor(nn.Module):
    """Projects tokens and compresses complete blocks of them into single entries (V4 report §2.3.1, §2.3.2)."""

    def __init__(
        self, config: DeepseekV4Config, name: str, head_dim: int, rate: int, overlap: bool, fp4: bool = False
    ) -> None:
        super().__init__()
        self.name, self.rate, self.overlap, self.head_dim, self.fp4 = name, rate, overlap, head_dim, fp4
        width = head_dim * (2 if overlap else 1)
        self.wkv = Linear(config.hidden_size, width)
        self.wgate = Linear(config.hidden_size, width)
        self.ape = nn.Parameter(torch.zeros(rate, width))
        self.norm = RMSNorm(head_dim, config.rms_norm_eps)

    def _series(self, state_EMC: Tensor) -> tuple[Tensor, Tensor]:
        """kv and biased gate `[E, M, D]`: for CSA series a of the block before, then series b of this one."""
        kv, gate = state_EMC.chunk(2, -1)
        if not self.overlap:
            return kv, gate + self.ape
        rate, dim = self.rate, self.head_dim
        kv = torch.cat((kv[:, :rate, :dim], kv[:, rate:, dim:]), 1)
        gate = torch.cat((gate[:, :rate, :dim] + self.ape[:, :dim], gate[:, rate:, dim:] + self.ape[:, dim:]), 1)
        return kv, gate

    def forward(self, x_TH: Tensor, context: AttentionContext, rope: Rope) -> Tensor:
        """The store `[S, head_dim]` with the entries that these tokens complete."""
        state_TC = torch.cat((self.wkv(x_TH).float(), self.wgate(x_TH).float()), -1)
        blocks = context.windows(self.name, state_TC, self.rate, self.overlap)
        kv_EMD, gate_EMD = self._series(blocks.state_EMC)
        entries_ED = self.norm(kernels.compress(kv_EMD, gate_EMD, blocks.valid_EM)).to(x_TH.dtype)
        cos, sin = rope.at(blocks.first_position_E)
        entries_ED = kernels.apply_rope(entries_ED, cos, sin)
        return context.entries(self.name, fake_quantize_mxfp4(entries_ED) if self.fp4 else entries_ED, self.rate)


class Indexer(nn.Module):
    """Chooses `index_topk` compressed entries for each token (V4 report eqs. 13-17).

    Keys and queries are rounded to MXFP4 if the config says so (`indexer_precision`), as in V4's QAT (§5.2.1).
    No gradient passes a choice; `Attention` trains the scores by an objective of their own where that is on.
    """

    def __init__(self, config: DeepseekV4Config, name: str) -> None:
        super().__init__()
        self.heads, self.head_dim, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.head_dim)
        self.weights_proj = Linear(config.hidden_size, self.heads)
        rate, self.fp4 = config.compress_rates[SPARSE], fp4_indexer(config)
        self.compressor = Compressor(config, f"{name}.compressor", self.head_dim, rate, overlap=True, fp4=self.fp4)

    def queries(self, x_TH: Tensor, q_latent_TL: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Queries `[T, H, D]` and head weights `[T, H]` of the scores."""
        q_THD = self.wq_b(q_latent_TL).unflatten(-1, (self.heads, self.head_dim))
        q_THD = kernels.apply_rope(q_THD, rope.cos_TR, rope.sin_TR)
        q_THD = fake_quantize_mxfp4(q_THD) if self.fp4 else q_THD
        return q_THD, self.weights_proj(x_TH).float() * (self.head_dim * self.heads) ** -0.5

    @torch.no_grad()
    def forward(self, x_TH: Tensor, q_latent_TL: Tensor, rope: Rope, past: Past) -> Tensor:
        """Rows of the entries chosen for each token, `[T, K]` in order of position, then -1."""
        assert past.candidates is not None and past.keys_SD is not None and past.key_candidates is not None
        own = past.key_candidates
        if own.columns <= self.topk:  # there is nothing to choose
            return past.candidates.rows_TE
        chosen_TK = kernels.index_topk(*self.queries(x_TH, q_latent_TL, rope), past.keys_SD, own, self.topk)
        return F.pad(past.candidates.rows_of(chosen_TK), (0, round_up(self.topk) - self.topk), value=-1)


class Attention(nn.Module):
    """Shared-KV multi-query attention over a sliding window and, by layer type, compressed entries."""

    def __init__(self, config: DeepseekV4Config, layer: int) -> None:
        super().__init__()
        self.kind = config.layer_types[layer]
        self.rope_kind = "main" if self.kind == SLIDING else "compress"
        self.name = f"layers.{layer}.attn"
        self.heads, self.head_dim, self.width = config.num_attention_heads, config.head_dim, config.sliding_window
        self.groups, self.eps = config.o_groups, config.rms_norm_eps
        self.wq_a = Linear(config.hidden_size, config.q_lora_rank)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.head_dim)
        self.wkv = Linear(config.hidden_size, self.head_dim)
        self.kv_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.wo_a = GroupedLinear(self.heads * self.head_dim // self.groups, self.groups * config.o_lora_rank)
        self.wo_b = Linear(self.groups * config.o_lora_rank, config.hidden_size)
        self.attn_sink = nn.Parameter(torch.zeros(self.heads))
        if self.kind != SLIDING:
            overlap = self.kind == SPARSE
            rate = config.compress_rates[self.kind]
            self.compressor = Compressor(config, f"{self.name}.compressor", self.head_dim, rate, overlap)
        if self.kind == SPARSE:
            self.indexer = Indexer(config, f"{self.name}.indexer")

    def remember(self, x_TH: Tensor, context: AttentionContext, rope: Rope) -> Past:
        """What these tokens leave for later ones, together with what earlier calls left."""
        kv_TD = kernels.apply_rope(self.kv_norm(self.wkv(x_TH)), rope.cos_TR, rope.sin_TR)
        window = context.window(self.name, kv_TD, self.width)
        if self.kind == SLIDING:
            return Past(*window)
        entries_SD = self.compressor(x_TH, context, rope)
        candidates = context.candidates(self.compressor.name, self.compressor.rate)
        if self.kind != SPARSE:
            return Past(*window, entries_SD, candidates)
        compressor = self.indexer.compressor
        record = recording()
        with torch.set_grad_enabled(torch.is_grad_enabled() and record is not None and record.indexer):
            keys_SD = compressor(x_TH.detach(), context, rope)  # detached: nothing but the indexer feels its objective
        return Past(*window, entries_SD, candidates, keys_SD, context.candidates(compressor.name, compressor.rate))

    def _train_indexer(
        self,
        record: Record,
        x_TH: Tensor,
        q_latent_TL: Tensor,
        q_THD: Tensor,
        sources: list[tuple[Tensor, Tensor]],
        rope: Rope,
        past: Past,
    ) -> None:
        """Leave the indexer's divergence from this attention; its input is detached, so that nothing else feels it."""
        window, (entries_SD, rows_TK) = sources
        assert past.candidates is not None and past.keys_SD is not None
        if record.all_candidates:
            rows_TK = past.candidates.rows_TE
        if rows_TK.shape[1]:
            scale = self.head_dim**-0.5
            target_TK = attention_target(q_THD, window, (entries_SD, rows_TK), self.attn_sink, scale)
            queries = self.indexer.queries(x_TH.detach(), q_latent_TL.detach(), rope)
            divergence = indexer_loss(*queries, past.keys_SD, rows_TK, target_TK)
            record.add_divergence(self.indexer.compressor.name, divergence)

    def forward(self, x_TH: Tensor, rope: Rope, past: Past) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`; `past` is of these tokens."""
        q_latent_TL = self.q_norm(self.wq_a(x_TH))
        q_THD = kernels.rms_norm(self.wq_b(q_latent_TL).unflatten(-1, (self.heads, self.head_dim)), None, self.eps)
        q_THD = kernels.apply_rope(q_THD, rope.cos_TR, rope.sin_TR)
        sources = [(past.window_SD, past.window_rows_TW)]
        if past.entries_SD is not None and past.candidates is not None:
            chosen = self.kind == SPARSE
            rows_TK = self.indexer(x_TH, q_latent_TL, rope, past) if chosen else past.candidates.rows_TE
            sources.append((past.entries_SD, rows_TK))
        out_THD = kernels.sparse_attention(q_THD, sources, self.attn_sink, self.head_dim**-0.5)
        if self.kind == SPARSE and (record := recording()) is not None and record.indexer:
            self._train_indexer(record, x_TH, q_latent_TL, q_THD, sources, rope, past)
        out_THD = kernels.apply_rope(out_THD, rope.cos_TR, rope.sin_TR, inverse=True)
        latent_TGO = self.wo_a(out_THD.reshape(len(out_THD), self.groups, -1))
        return self.wo_b(latent_TGO.flatten(1))


class Gate(nn.Module):
    """Router: by score with a selection bias, or by a frozen table of token ids in the first layers."""

    def __init__(self, config: DeepseekV4Config, layer: int) -> None:
        super().__init__()
        self.hashed = config.mlp_layer_types[layer] == "hash_moe"
        self.layer = layer
        self.k, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if self.hashed:
            self.register_buffer("tid2eid", torch.zeros(config.vocab_size, self.k, dtype=torch.int64))
        else:
            # fp32 in an engine of another dtype too: updates of 1e-3 would be lost in bf16
            self.register_buffer("bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x_TH: Tensor, tokens_T: Tensor | RoutedTokens) -> tuple[Tensor, Tensor]:
        """Experts and weights `[T, k]`."""
        if self.hashed:
            return kernels.route_hash(x_TH, self.weight, self.tid2eid, token_ids(tokens_T), self.scaling)
        experts_TK, weights_TK = kernels.route_topk(x_TH, self.weight, self.bias, self.k, self.scaling)
        given_TK = given_experts(tokens_T, self.layer, experts_TK)
        if given_TK is not None:  # a table with a row for each token
            numbers_T = torch.arange(len(given_TK), device=given_TK.device)
            experts_TK, weights_TK = kernels.route_hash(x_TH, self.weight, given_TK, numbers_T, self.scaling)
        if (record := recording()) is not None:
            record.add_routing(self.layer, x_TH, self.weight, experts_TK)
        return experts_TK, weights_TK


class ExpertWeights(nn.Module):
    """Experts' matrices stacked: `w13[E, 2I, H]` is gate above up, `w2[E, H, I]` is down. No `E` for one expert.

    With `fp4` the parameters are master weights: tokens meet them rounded to MXFP4 (V4 report §5.2.1), and gradients go
    straight through to the masters. Engines hold the rounded numbers alone (`PackedExperts`).
    """

    def __init__(self, lead: tuple[int, ...], hidden: int, inner: int, fp4: bool = False) -> None:
        super().__init__()
        self.fp4 = fp4
        self.w13 = nn.Parameter(torch.empty(*lead, 2 * inner, hidden))
        self.w2 = nn.Parameter(torch.empty(*lead, hidden, inner))

    def forward(
        self, x_TH: Tensor, limit: float, experts_TK: Tensor | None = None, weights_TK: Tensor | None = None
    ) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`: by these experts and weights, or by the only one."""
        if experts_TK is None or weights_TK is None:
            return kernels.swiglu_mlp(x_TH, *self.matrices(), limit)
        return kernels.moe_experts(x_TH, experts_TK, weights_TK, *self.matrices(), limit)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """`w13` and `w2` as tokens meet them."""
        return (fake_quantize_mxfp4(self.w13), fake_quantize_mxfp4(self.w2)) if self.fp4 else (self.w13, self.w2)

    @torch.no_grad()
    def round_masters(self) -> None:
        """Make the masters what tokens meet, in a model that nobody trains."""
        if self.fp4:
            for master, matrix in zip((self.w13, self.w2), self.matrices(), strict=True):
                master.copy_(matrix)
        self.fp4 = False


class PackedExperts(nn.Module):
    """Routed experts in MXFP4, as a sampler of `fp4_experts` holds them: `w13`, `w2` are rows of `pack_rows_mxfp4`."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        shapes = {"w13": (2 * inner, packed_bytes(hidden)), "w2": (hidden, packed_bytes(inner))}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(experts, *shape, dtype=torch.uint8))

    def forward(self, x_TH: Tensor, limit: float, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`; no gradient."""
        return kernels.moe_experts(x_TH, experts_TK, weights_TK, self.w13, self.w2, limit)


class MixtureOfExperts(nn.Module):
    """Routed experts plus the shared one."""

    def __init__(self, config: DeepseekV4Config, layer: int, packed: bool) -> None:
        super().__init__()
        self.limit = config.swiglu_limit
        sizes = config.hidden_size, config.moe_intermediate_size
        self.gate = Gate(config, layer)
        self.experts = (
            PackedExperts(config.n_routed_experts, *sizes)
            if packed
            else ExpertWeights((config.n_routed_experts,), *sizes, fp4=fp4_experts(config))
        )
        self.shared_experts = ExpertWeights((), *sizes)

    def forward(self, x_TH: Tensor, tokens_T: Tensor | RoutedTokens) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`."""
        experts_TK, weights_TK = self.gate(x_TH, tokens_T)
        routed = self.experts(x_TH, self.limit, experts_TK, weights_TK)
        return routed + self.shared_experts(x_TH, self.limit)


class HyperConnection(nn.Module):
    """The parameters of one mHC site."""

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__()
        n = config.hc_mult
        self.fn = nn.Parameter(torch.empty((2 + n) * n, n * config.hidden_size))
        self.base = nn.Parameter(torch.zeros((2 + n) * n))
        self.scale = nn.Parameter(torch.ones(3))
        self.constants = {
            "iterations": config.hc_sinkhorn_iters,
            "eps": config.hc_eps,
            "norm_eps": config.rms_norm_eps,
        }

    def forward(self, streams_TND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input of the sub-layer, the weights that `mhc_post` puts its output back with, and the streams it takes."""
        return kernels.mhc_site(streams_TND, self.fn, self.base, self.scale, **self.constants)


class Block(nn.Module):
    """Attention and experts, each between an mHC collapse and an mHC expansion."""

    def __init__(self, config: DeepseekV4Config, layer: int, packed: bool = False) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.ffn = MixtureOfExperts(config, layer, packed)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_attn = HyperConnection(config)
        self.hc_ffn = HyperConnection(config)

    def forward(
        self, streams_TND: Tensor, tokens_T: Tensor | RoutedTokens, context: AttentionContext, ropes: dict[str, Rope]
    ) -> Tensor:
        """Streams `[T, n, hidden]` to streams."""
        rope = ropes[self.attn.rope_kind]
        x_TH, *put_back = self.hc_attn(streams_TND)
        x_TH = self.attn_norm(x_TH)
        return self._finish(x_TH, put_back, tokens_T, rope, self.attn.remember(x_TH, context, rope))

    def remember(self, streams_TND: Tensor, context: AttentionContext, ropes: dict[str, Rope]) -> Past:
        """All that tokens of this layer know of one another; the rest is each token's own (`after`)."""
        x_TH, *_ = self.hc_attn(streams_TND)
        return self.attn.remember(self.attn_norm(x_TH), context, ropes[self.attn.rope_kind])

    def after(self, streams_TND: Tensor, tokens_T: Tensor | RoutedTokens, rope: Rope, past: Past) -> Tensor:
        """`forward` of some of the tokens, once `past` is there: theirs alone."""
        x_TH, *put_back = self.hc_attn(streams_TND)
        return self._finish(self.attn_norm(x_TH), put_back, tokens_T, rope, past)

    def _finish(
        self, x_TH: Tensor, put_back: list[Tensor], tokens_T: Tensor | RoutedTokens, rope: Rope, past: Past
    ) -> Tensor:
        post_TN, comb_TNN, streams_TND = put_back
        streams_TND = kernels.mhc_post(streams_TND, self.attn(x_TH, rope, past), post_TN, comb_TNN)
        x_TH, post_TN, comb_TNN, streams_TND = self.hc_ffn(streams_TND)
        return kernels.mhc_post(streams_TND, self.ffn(self.ffn_norm(x_TH), tokens_T), post_TN, comb_TNN)
