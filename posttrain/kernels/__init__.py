"""The op table: every operation of the V4 model, called by the trainer and by the rollout engine alike.

All ops take packed tokens (no padding) and hold to three rules, which together make the
sampler's log-probabilities the trainer's:

1. *Batch invariance.* A token's result does not depend on which other tokens are in the call.
   On CPU this needs care in two places: matrix products with few rows take another path in the
   BLAS library (`linear` pads rows), and vectorised transcendental functions differ from their scalar
   remainders (the compiled kernels have their own).
2. *Length invariance.* Candidate lists are padded to multiples of `BLOCK`; entries that do not exist take no part,
   and those that do are added in order, so that more padding changes nothing.
3. *Ties go to the lowest index* in every top-k.

A family is a directory: `op.py` is what the model calls (it checks shapes, then runs a kernel), `cpu.py` the kernels
for the CPU, compiled by numba at their first call, `oracle.py` the same in plain differentiable torch: what tests
compare with, and what runs in fp64 and on devices that have no kernels yet.
"""

from posttrain.kernels.attention.op import sparse_attention
from posttrain.kernels.blocks import BLOCK
from posttrain.kernels.compress.op import compress
from posttrain.kernels.indexer.candidates import Candidates
from posttrain.kernels.indexer.op import index_divergence, index_scores, index_topk, topk_stable
from posttrain.kernels.linear.op import grouped_linear, linear
from posttrain.kernels.mhc.op import mhc_head, mhc_post, mhc_pre, mhc_site
from posttrain.kernels.moe.op import moe_experts, route_hash, route_topk, swiglu_mlp
from posttrain.kernels.norm.op import rms_norm
from posttrain.kernels.rope.op import apply_rope
from posttrain.kernels.vocabulary.op import divergence_gradients, linear_divergence, linear_logprob

__all__ = [
    "BLOCK",
    "Candidates",
    "apply_rope",
    "compress",
    "divergence_gradients",
    "grouped_linear",
    "index_divergence",
    "index_scores",
    "index_topk",
    "linear",
    "linear_divergence",
    "linear_logprob",
    "mhc_head",
    "mhc_post",
    "mhc_pre",
    "mhc_site",
    "moe_experts",
    "rms_norm",
    "route_hash",
    "route_topk",
    "sparse_attention",
    "swiglu_mlp",
    "topk_stable",
]
