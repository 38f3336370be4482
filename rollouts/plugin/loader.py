"""Weights for a server: vLLM reads the checkpoint itself; an engine of a run gets its weights from the publisher."""

from __future__ import annotations

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from posttrain.models.deepseek_v4.checkpoint import iterate_tensors, load_into, resolve_directory

CHECKPOINT = "checkpoint"
"""The key of `model_loader_extra_config` that names the checkpoint."""


class CheckpointLoader(BaseModelLoader):
    """`load_format: posttrain`: a checkpoint in any layout that `from_pretrained` reads, one tensor at a time."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Fetch a checkpoint of the hub."""
        resolve_directory(self.load_config.model_loader_extra_config[CHECKPOINT])

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill every parameter and buffer.

        Raises:
            CheckpointError: tensors that are missing, unknown, or of another shape.
        """
        directory = resolve_directory(self.load_config.model_loader_extra_config[CHECKPOINT])
        load_into(model.state_dict(), iterate_tensors(directory), str(directory))
