"""The order of the examination: the machine, what the recipe names, then a rehearsal of every stage."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from posttrain.doctor.inputs import Inputs, look_at_inputs
from posttrain.doctor.machine import look_at_machine
from posttrain.doctor.rehearsal import rehearse
from posttrain.doctor.verdicts import Verdict, tried
from posttrain.recipe import Recipe
from posttrain.rundir import RunDirectory


def examine(recipe: Recipe, runs: Path, quick: bool = False) -> Iterator[Verdict]:
    """Verdicts, one after the other as they are found.

    Args:
        runs: where the run's directory would be; its disk is looked at, and nothing stays there.
        quick: leave out the rehearsal, which starts actors and trains three steps of every stage.
    """
    yield from look_at_machine(recipe, runs)
    with tempfile.TemporaryDirectory(prefix="posttrain-doctor-") as scratch:
        with RunDirectory.create(scratch, "inputs", recipe) as run:
            inputs = Inputs(recipe, run)
            usable = True
            for verdict in look_at_inputs(inputs):
                usable &= verdict.status != "failed"
                yield verdict
        if quick or not usable:
            reason = "left out by --quick" if quick else "what is above has to be mended first"
            yield Verdict("rehearsal", "skipped", reason)
            return
        yield from tried("rehearsal", lambda: rehearse(recipe, Path(scratch), runs))
