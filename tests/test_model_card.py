"""The card of an exported checkpoint says what its run's recipe and report say."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from posttrain.observe.model_card import model_card, run_report
from posttrain.recipe import read_recipe
from tests.observe_kit import finished_run, write_run
from tests.v4_models import our_model


def test_a_checkpoint_of_a_run_brings_its_recipe_and_results(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, finished_run())
    checkpoint = run / "checkpoints" / "student"
    our_model(0).save_pretrained(checkpoint)
    text = model_card(checkpoint, "bf16", [])
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert "# tiny-v4: student" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| **student**")]
    cell = next(model for model in run_report(checkpoint)["models"] if model["name"] == "student")["eval"]["arithmetic"]
    assert f"{cell['pass@1']:.1%}" in row
    made = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert made == read_recipe(run / "recipe.yaml").model_dump(mode="json")


def test_a_stage_that_was_not_measured_has_no_results(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, [])
    our_model(0).save_pretrained(run / "checkpoints" / "base")
    text = model_card(run / "checkpoints" / "base", "fp8_fp4", ["head_dim is 32"])
    assert "## Results" not in text
    assert "vLLM's own V4 would not load it: head_dim is 32" in text
