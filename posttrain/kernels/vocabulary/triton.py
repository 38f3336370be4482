"""The family's Triton kernels, in two files."""

from posttrain.kernels.vocabulary.triton_divergence import gradient, statistics
from posttrain.kernels.vocabulary.triton_logprob import logprob, logprob_gradient

__all__ = ["gradient", "logprob", "logprob_gradient", "statistics"]
