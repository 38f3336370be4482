"""Stage names taken apart: `base`, `expert/<domain>/<kind>`, `student`."""

from __future__ import annotations

from collections.abc import Sequence

KINDS = {
    "sft": "supervised fine-tuning",
    "grpo": "reinforcement learning (GRPO)",
    "student": "on-policy distillation",
    "base": "mixed-domain supervised fine-tuning",
}


def domain_of(stage: str) -> str | None:
    """The domain of an expert's stage, None for every other."""
    parts = stage.split("/")
    return parts[1] if len(parts) == 3 and parts[0] == "expert" else None


def kind_of(stage: str) -> str:
    """`sft`, `grpo`, ... for an expert's stage, else the stage's own name."""
    return stage.rpartition("/")[2]


def colour_of(name: str, domains: Sequence[str]) -> str:
    """The style class of a stage, a model or a domain: a domain has one colour on the whole page."""
    domain = domain_of(name) or name
    if domain in domains:
        return f"c{list(domains).index(domain) % 8}"
    return "cstudent" if name == "student" else "cbase"
