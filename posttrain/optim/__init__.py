"""Optimizers: V4's Muon with AdamW for the rest, or AdamW alone."""

from posttrain.optim.build import build_optimizer
from posttrain.optim.muon import Muon

__all__ = ["Muon", "build_optimizer"]
