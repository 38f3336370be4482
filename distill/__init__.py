"""Distillation's own parts: divergences over the whole vocabulary, and the teachers that are asked for them."""
