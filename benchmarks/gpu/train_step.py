"""Forward and backward of a V4-Flash-shaped slice on one GPU: ours against transformers' V4.

`python -m benchmarks.gpu.train_step [--quick]`. Two layers with the true dimensions of V4-Flash (one CSA, one HCA),
all 256 experts, the whole vocabulary; bf16 weights and gradients, no optimiser. A step adds to gradients that are
there, as every micro-batch after the first does; short ones are timed one after the other, as in training, where one is
launched while the GPU is still at the last. Memory is what a step needs beside weights and gradients.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from benchmarks.gpu.timing import peak_bytes, seconds

TOKENS_TIMED = 16_384
"""Micro-batches of so many tokens in all are timed one after the other."""

LAYERS = ["compressed_sparse_attention", "heavily_compressed_attention"]


def slice_config() -> DeepseekV4Config:
    """V4-Flash (the defaults of transformers' configuration) cut to two layers."""
    return DeepseekV4Config(
        num_hidden_layers=2,
        layer_types=LAYERS,
        mlp_layer_types=["moe", "moe"],
        max_position_embeddings=131_072,
        num_nextn_predict_layers=0,
        use_cache=False,
    )


def random_weights(model: nn.Module) -> None:
    """Small random matrices, ones in norms, on the GPU, gradients allocated."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                parameter.fill_(1)
            elif parameter.dim() >= 2:
                parameter.normal_(0, 0.02)
            else:
                parameter.zero_()
        parameter.grad = torch.zeros_like(parameter)
    for _, buffer in model.named_buffers():
        if buffer.dtype == torch.int64:
            buffer.zero_()


def our_model() -> nn.Module:
    """Matrices in bf16; what the released checkpoints keep in fp32 stays so."""
    from posttrain.kernels.gradients import accumulate_in_place
    from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
    from posttrain.models.deepseek_v4.checkpoint import FLOAT32

    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(slice_config())
    for name, parameter in model.named_parameters():
        if not FLOAT32.search(name):
            parameter.data = parameter.data.to(torch.bfloat16)
    model.to_empty(device="cuda")
    random_weights(model)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):
            buffer.zero_()
    accumulate_in_place(model)
    return model.train()


def our_step(model: Any) -> Callable[[Tensor], None]:
    """The loss comes from hidden states; logits of the whole sequence are never there."""
    from posttrain import kernels

    def step(tokens_1T: Tensor) -> None:
        hidden_TH = model.model(tokens_1T).last_hidden_state[0, :-1]
        logprobs_T, _ = kernels.linear_logprob(hidden_TH, model.lm_head.weight, tokens_1T[0, 1:])
        (-logprobs_T.mean()).backward()

    return step


def their_model(experts: str) -> nn.Module:
    """transformers' V4 in bf16 with its fp32 rotary frequencies."""
    from transformers import DeepseekV4ForCausalLM
    from transformers.initialization import no_init_weights

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"), no_init_weights():
            model = DeepseekV4ForCausalLM(slice_config())
    finally:
        torch.set_default_dtype(torch.float32)
    model.set_experts_implementation(experts)
    random_weights(model)
    return model.train()


def their_step(model: Any) -> Callable[[Tensor], None]:
    """The model's own loss."""

    def step(tokens_1T: Tensor) -> None:
        model(input_ids=tokens_1T, labels=tokens_1T, use_cache=False).loss.backward()

    return step


def measured(step: Callable[[Tensor], None], length: int, repeats: int) -> dict[str, Any]:
    """Tokens per second and peak memory; the error's first line where it does not fit."""
    tokens_1T = torch.randint(0, 129_280, (1, length), device="cuda")
    steps = max(1, TOKENS_TIMED // length)

    def train() -> None:
        for _ in range(steps):
            step(tokens_1T)

    try:
        peak = peak_bytes(lambda: step(tokens_1T))
        time = seconds(train, repeats, warm_up=1) / steps
    except torch.OutOfMemoryError as error:
        return {"error": str(error).splitlines()[0]}
    finally:
        torch.cuda.empty_cache()
    return {"tokens_per_second": length / time, "seconds": time, "peak_bytes_beside_weights_and_gradients": peak}


def free(model: nn.Module) -> None:
    """Give its memory back."""
    model.to("meta")
    gc.collect()
    torch.cuda.empty_cache()


def measure(quick: bool) -> dict[str, Any]:
    """Ours at 4k, 32k and 128k tokens (checkpointing layers from 32k on), transformers' at 4k."""
    repeats = 2 if quick else 5
    ours = our_model()
    step = our_step(ours)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "layers": LAYERS, "ours": {}, "transformers": {}}
    results["parameters"] = sum(parameter.numel() for parameter in ours.parameters())
    results["ours"]["4096"] = measured(step, 4096, repeats)
    ours.gradient_checkpointing_enable()
    for length in (32_768,) if quick else (32_768, 131_072):
        results["ours"][str(length)] = measured(step, length, max(1, repeats // 2))
    del step
    free(ours)
    theirs = their_model("grouped_mm")
    results["transformers"]["4096"] = measured(their_step(theirs), 4096, repeats)
    theirs.gradient_checkpointing_enable()
    results["transformers"]["4096, checkpointing"] = measured(their_step(theirs), 4096, repeats)
    free(theirs)
    return results


if __name__ == "__main__":
    print(json.dumps(measure(quick="--quick" in sys.argv), indent=2))
