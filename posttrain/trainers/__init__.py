"""Trainers: SFT, GRPO and on-policy distillation on TRL, and the Ray actor that runs them."""
