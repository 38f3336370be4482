"""What we rely on inside TRL. A failure here names what a version bump has changed."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from posttrain.trainers import trl_seam
from posttrain.trainers.trl_seam import GRPOTrainer


def test_trl_is_the_one_the_seam_was_written_for() -> None:
    assert not trl_seam.broken_contracts(), "\n".join(trl_seam.broken_contracts())


def test_a_renamed_parameter_is_named_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trl_seam.PARAMETERS, GRPOTrainer._compute_loss, ("self", "model", "batch"))
    (message,) = trl_seam.broken_contracts()
    assert "GRPOTrainer._compute_loss" in message
    assert "'inputs'" in message


def test_a_changed_source_is_named_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trl_seam.SOURCE, GRPOTrainer._generate_single_turn, ("self.sampler.generate(",))
    (message,) = trl_seam.broken_contracts()
    assert "`self.sampler.generate(`" in message


def test_the_driver_loads_no_torch_and_the_trainers_load_no_vllm() -> None:
    script = """
import sys
def loaded(package): return any(name.split(".")[0] == package for name in sys.modules)
import posttrain.trainers.actor
print(loaded("torch"))
import posttrain.trainers.grpo, posttrain.trainers.opd, posttrain.trainers.sft
print(loaded("torch"), loaded("vllm"))
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "True", "False"]


def test_trl_knows_of_vllm_again_after_the_import() -> None:
    assert trl_seam.trl_imports.is_vllm_available.__module__ == "trl.import_utils"


def test_an_injected_generation_is_asked_for_samples() -> None:
    trainer = SimpleNamespace()
    generation = SimpleNamespace()
    trl_seam.inject_generation(trainer, generation)
    assert vars(trainer) == {"use_vllm": True, "vllm_generation": generation, "_last_loaded_step": -1}
