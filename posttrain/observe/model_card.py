"""README.md of an exported checkpoint: what it is, how it was made, what it scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from posttrain.models.deepseek_v4.checkpoint import read_config
from posttrain.recipe.document import RecipeDumper

FORMATS = {
    "bf16": "matrices in bf16; norms, mHC, sinks and biases in fp32",
    "fp8_fp4": "linears in FP8 (E4M3, 128 × 128), routed experts in MXFP4 (blocks of 32), the rest as in bf16",
}

LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```"""
"""In fp32, because transformers 5.19 multiplies fp32 activations with bf16 matrices in a V4 that it loads in bf16."""


def model_card(checkpoint: Path, kind: str, notes: list[str]) -> str:
    """The card's text. A checkpoint in a run's directory brings the run's recipe and results along.

    Args:
        checkpoint: what is exported.
        kind: a key of `FORMATS`.
        notes: why vLLM's own V4 would not load the export, if it would not.
    """
    report = run_report(checkpoint)
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["deepseek_v4", "posttrain"])
    parts = [f"---\n{data.to_yaml()}\n---", f"# {_title(checkpoint, report)}", *_what(checkpoint, kind, notes)]
    if report is not None:
        parts += [*_results(checkpoint, report), *_made(report)]
    return "\n\n".join(parts) + "\n"


def run_report(checkpoint: Path) -> dict[str, Any] | None:
    """The report of the run that made a checkpoint; None for any other checkpoint."""
    from posttrain.observe.report import build_report

    run = checkpoint.resolve().parent.parent
    return build_report(run) if (run / "recipe.yaml").is_file() else None


def _title(checkpoint: Path, report: dict[str, Any] | None) -> str:
    name = checkpoint.resolve().name.replace("--", "/")
    return f"{report['name']}: {name}" if report else name


def _what(checkpoint: Path, kind: str, notes: list[str]) -> Iterator[str]:
    config = read_config(checkpoint)
    yield (
        f"A DeepSeek-V4 of {config.num_hidden_layers} layers, width {config.hidden_size}, {config.n_routed_experts} "
        f"routed experts ({config.num_experts_per_tok} of them for a token) and {config.vocab_size} tokens of "
        f"vocabulary, in the released layout: {FORMATS[kind]}."
    )
    yield LOADING
    if notes:
        yield "vLLM's own V4 would not load it: " + "; ".join(notes) + ". `posttrain serve DIRECTORY` does."
    else:
        yield "`vllm serve DIRECTORY` or `posttrain serve DIRECTORY` give it an OpenAI-compatible endpoint."


def _results(checkpoint: Path, report: dict[str, Any]) -> Iterator[str]:
    """Accuracy of this model and of those that it comes from, by domain."""
    here = checkpoint.resolve().name
    models = [model for model in report["models"] if model["eval"]]
    if not any(Path(model["checkpoint"]).name == here for model in models):
        return
    domains = list(models[0]["eval"])
    rows = ["| pass@1, 95 % interval | " + " | ".join(domains) + " |", "| --- |" + " --- |" * len(domains)]
    for model in models:
        name = f"**{model['name']}**" if Path(model["checkpoint"]).name == here else model["name"]
        rows.append(f"| {name} | " + " | ".join(_cell(model["eval"].get(domain)) for domain in domains) + " |")
    yield "## Results"
    yield "Held-out problems of each domain; this model in bold."
    yield "\n".join(rows)


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = found["ci95"]
    return f"{found['pass@1']:.1%} ({low:.1%} to {high:.1%}, n = {found['n']})"


def _made(report: dict[str, Any]) -> Iterator[str]:
    yield "## How it was made"
    packages = ", ".join(f"{name} {version}" for name, version in report["environment"]["packages"].items())
    commit = report["environment"].get("commit")
    where = f" at commit {commit}" if commit else ""
    yield f"By posttrain{where}, seed {report['seed']}, with {packages}, from this recipe:"
    recipe = yaml.dump(report["recipe"], Dumper=RecipeDumper, sort_keys=False, width=100, allow_unicode=True)
    yield f"```yaml\n{recipe.strip()}\n```"
