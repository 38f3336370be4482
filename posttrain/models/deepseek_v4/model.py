"""DeepSeek-V4 as a Hugging Face causal language model whose inside knows no padding.

`DeepseekV4Model.forward_packed` is the model; the engine plugin and the trainers both call it. Around it, `forward`
takes padded batches (either side) or packed rows with restarting positions, as TRL, PEFT and lm-eval give them,
and lays the tokens out packed, so that padding can never change a result (transformers' own V4 is wrong for
left padding and for packing: https://github.com/huggingface/transformers/issues/45938).
"""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV4Config, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from posttrain import kernels
from posttrain.kernels.quant.op import pack_rows_mxfp4
from posttrain.models.deepseek_v4 import checkpoint as checkpoints
from posttrain.models.deepseek_v4 import chunks
from posttrain.models.deepseek_v4.auxiliary import Auxiliary, Record, run_layer
from posttrain.models.deepseek_v4.config import fp4_experts
from posttrain.models.deepseek_v4.context import AttentionContext, PackedContext
from posttrain.models.deepseek_v4.layers import Block, Gate, HyperConnection, Linear, RMSNorm, RopeTables
from posttrain.models.deepseek_v4.routing import RoutedTokens, check_routes, token_ids


class DeepseekV4PreTrainedModel(PreTrainedModel):
    config_class = DeepseekV4Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights; mHC starts near the plain residual: streams kept apart, gates small (report §5.3)."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | Gate):
            module.weight.normal_(0, std)
        for name in ("w13", "w2", "hc_head_fn"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                getattr(module, name).normal_(0, std)
        if isinstance(module, HyperConnection):
            module.fn.normal_(0, std)
            module.scale.fill_(0.1)
            module.base[2 * self.config.hc_mult :] = 3 * torch.eye(self.config.hc_mult).flatten()
        if isinstance(module, Gate) and module.hashed:
            # Distinct experts for each token id, every expert equally often.
            experts, vocab = self.config.n_routed_experts, self.config.vocab_size
            orders = torch.rand(vocab, experts, generator=torch.Generator().manual_seed(0)).argsort(1)
            module.tid2eid.copy_(orders[:, : module.k])


EXPERTS = re.compile(r"\.ffn\.experts\.w(13|2)$")
"""Names of the routed experts' matrices."""


class DeepseekV4Model(DeepseekV4PreTrainedModel):
    """The backbone: token ids to the normed hidden states that the head reads."""

    auxiliary: Auxiliary | None = None
    """Objectives beside the language-model loss, for forward passes with gradients; None: there are none."""

    def __init__(self, config: DeepseekV4Config, packed: bool = False) -> None:
        """`packed`: routed experts as samplers hold them under `fp4_experts`."""
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer, packed) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        n = config.hc_mult
        self.hc_head_fn = nn.Parameter(torch.empty(n, n * config.hidden_size))
        self.hc_head_base = nn.Parameter(torch.zeros(n))
        self.hc_head_scale = nn.Parameter(torch.ones(1))
        self.ropes = RopeTables(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embed = value

    def forward_packed(self, tokens_T: Tensor | RoutedTokens, context: AttentionContext) -> Tensor:
        """Hidden states `[T, hidden]` after the mHC collapse and the final norm (what OPD teachers return).

        Args:
            tokens_T: int64 ids of all sequences, packed; perhaps with the experts to use.
            context: where each token's past is.
        """
        config = self.config
        streams_TND = self.embed(token_ids(tokens_T)).unsqueeze(1).repeat(1, config.hc_mult, 1)
        ropes = {kind: self.ropes(kind, context.positions_T) for kind in ("main", "compress")}
        recording: AbstractContextManager[Record | None] = nullcontext()
        if self.auxiliary is not None and torch.is_grad_enabled() and isinstance(context, PackedContext):
            recording = self.auxiliary.record(context)
        with recording as record:
            for layer in self.layers:
                streams_TND = self._layer(record, layer, streams_TND, tokens_T, context, ropes)
        collapsed_TD = kernels.mhc_head(
            streams_TND,
            self.hc_head_fn,
            self.hc_head_base,
            self.hc_head_scale,
            eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
        )
        return self.norm(collapsed_TD)

    def _layer(self, record: Record | None, layer: nn.Module, streams_TND: Tensor, *others: Any) -> Tensor:
        """With gradient checkpointing keep its input alone, and of a long sequence compute a part at a time."""
        if not (self.gradient_checkpointing and self.training):
            return run_layer(record, layer, streams_TND, *others)
        if record is None and len(streams_TND) > chunks.TOKENS and streams_TND.requires_grad:
            return chunks.in_chunks(layer, streams_TND, *others)
        result: Tensor = checkpoint(run_layer, record, layer, streams_TND, *others, use_reentrant=False)
        return result

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        routes: Tensor | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPast:
        """Padded or packed rows.

        Args:
            input_ids: `[B, S]`.
            attention_mask: `[B, S]`, 0 on padding, which may stand on either side. Positions count real tokens.
            position_ids: without a mask, `[B, S]` positions that restart at 0 where a packed sequence starts.
            routes: experts to use, `[B, S, layers, k]` of any integer type; -1: the layer's own choice.

        Returns:
            `last_hidden_state` `[B, S, hidden]`, zeros on padding.
        """
        if input_ids is None:
            raise ValueError("DeepseekV4Model needs input_ids: its first layers route by token id")
        rows_T, context = _packing(input_ids, attention_mask, position_ids)
        flat: Tensor | RoutedTokens = input_ids.flatten()
        if routes is not None:
            config = self.config
            check_routes(
                routes, input_ids, config.num_hidden_layers, config.num_experts_per_tok, config.n_routed_experts
            )
            flat = RoutedTokens(input_ids.flatten(), routes.flatten(0, 1))
        if rows_T is None:
            return BaseModelOutputWithPast(
                last_hidden_state=self.forward_packed(flat, context).view(*input_ids.shape, -1)
            )
        hidden_TD = self.forward_packed(flat[rows_T], context)
        hidden = hidden_TD.new_zeros(input_ids.numel(), hidden_TD.shape[-1]).index_copy(0, rows_T, hidden_TD)
        return BaseModelOutputWithPast(last_hidden_state=hidden.view(*input_ids.shape, -1))


def _packing(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor | None, PackedContext]:
    """Rows of the flattened batch that are real tokens (None: all), and their context."""
    batch, length = input_ids.shape
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be [batch, length], 0 on padding; got shape {tuple(attention_mask.shape)}"
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        mask = attention_mask.bool()
        lengths = mask.sum(1)
        return mask.flatten().nonzero().squeeze(1), PackedContext(_boundaries(lengths))
    if attention_mask is None and position_ids is not None:
        positions = position_ids.expand(batch, length)
        starts = torch.zeros_like(positions, dtype=torch.bool)
        starts[:, 0] = True
        starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        first = starts.flatten().nonzero().squeeze(1)
        if bool((positions.flatten()[first] != 0).any()):
            raise ValueError("position_ids must count up from 0 in every packed sequence")
        return None, PackedContext(torch.cat((first, first.new_tensor([batch * length]))))
    return None, PackedContext(torch.arange(batch + 1) * length, input_ids.device)


def _boundaries(lengths_B: Tensor) -> Tensor:
    return torch.cat((lengths_B.new_zeros(1), lengths_B.cumsum(0)))


class DeepseekV4ForCausalLM(DeepseekV4PreTrainedModel, GenerationMixin):
    """Backbone and head. `from_pretrained` reads released and transformers' layouts, `save_pretrained` the former."""

    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: `generate` would build a cache by the config's layer types, and this model keeps none."""
        return False

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__(config)
        self.model = DeepseekV4Model(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> dict:
        """Every step reads the whole sequence: fast generation is the engine's work."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        routes: Tensor | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, S or logits_to_keep, V]` in the weights' dtype, and the mean cross-entropy if labels are given.

        Arguments as in `DeepseekV4Model.forward`; labels `[B, S]` hold -100 where there is nothing to predict.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, routes)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else kept
        hidden = outputs.last_hidden_state[:, kept]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **unused)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: DeepseekV4Config | None = None,
        dtype: torch.dtype | str | None = None,
        **hub: Any,
    ) -> DeepseekV4ForCausalLM:
        """Load a directory or a hub id, in the released layout or as transformers saved it.

        Args:
            dtype: of the matrices; mHC, sinks, norms, position biases and router biases stay fp32. Default: fp32.
            hub: revision, cache_dir, token, local_files_only.

        Raises:
            CheckpointError: files or tensors are missing, unknown, or of another shape; the message names them.
        """
        directory = checkpoints.resolve_directory(pretrained_model_name_or_path, **hub)
        config = config or checkpoints.read_config(directory)
        with torch.device("meta"):
            model = cls(config)
        checkpoints.materialise(model, directory, dtype)
        model.eval()
        return model

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike, state_dict: dict[str, Tensor] | None = None, **unused: Any
    ) -> None:
        """Write config.json and safetensors under the released names into `save_directory`."""
        checkpoints.write(self.config, state_dict or self.state_dict(), save_directory)

    def engine_state_dict(self, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The tensors that a rollout engine's copy of this model loads, by its own names: views of the model's.

        Experts of `fp4_experts` are rounded here, once for trainer and engines: rows of `pack_rows_mxfp4`.

        Args:
            state_dict: instead of the model's own.
        """
        tensors = {name: tensor.detach() for name, tensor in (state_dict or self.state_dict()).items()}
        if fp4_experts(self.config):
            tensors |= {name: pack_rows_mxfp4(tensor) for name, tensor in tensors.items() if EXPERTS.search(name)}
        return tensors
