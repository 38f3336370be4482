"""`python -m benchmarks.packing`: SFT with packed and with padded batches, in turn on the same examples.

Writes packing.json: seconds of a step (median over the steps after the first two), and the largest difference of the
losses of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.sft_kit import Setting
from posttrain.data.rows import IGNORED
from posttrain.files import atomic_write
from posttrain.observe.environment import describe_environment

RECIPES = (Path("recipes/tiny_v4.yaml"), Path("recipes/tiny_hf_qwen3.yaml"))


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing", description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="directory of packing.json")
    arguments = parser.parse_args()
    results = []
    for recipe in RECIPES:
        setting = Setting.load(recipe)
        results.append({"recipe": recipe.name, "rows": "of the recipe", **compare(setting, arguments, 32)})
        setting.train_rows = mixed_rows(setting, 256, arguments.steps * 64)
        results.append({"recipe": recipe.name, "rows": "of 8 to 256 tokens", **compare(setting, arguments, 256)})
    document = {"schema": 1, "environment": describe_environment(), "results": results}
    atomic_write(arguments.output / "packing.json", json.dumps(document, indent=2) + "\n")
    print(
        "| recipe | examples | padding | padded, ms a step | packed | padded / packed | largest difference of losses |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for one in results:
        print(
            f"| {one['recipe']} | {one['rows']} | {100 * one['padding']:.0f} % | {1000 * one['padded']:.0f} "
            f"| {1000 * one['packed']:.0f} | {one['padded'] / one['packed']:.2f} | {one['difference']:.1e} |"
        )


def mixed_rows(setting: Setting, longest: int, count: int) -> list[dict[str, list[int]]]:
    """Examples of which few are long, as conversations are: random tokens, a quarter of them the answer."""
    draw = Random(0)
    rows = []
    for _ in range(count):
        length = int(8 * (longest / 8) ** draw.random())
        ids = [draw.randrange(10, len(setting.tokenizer)) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [IGNORED] * (length - length // 4) + ids[length - length // 4 :]})
    return rows


def compare(setting: Setting, arguments: argparse.Namespace, max_length: int) -> dict[str, Any]:
    """Both layouts in turn."""
    stage = {"steps": arguments.steps, "batch_size": 64, "max_length": max_length, "optimizer": {"lr": 1e-3}}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    differences = []
    for _ in range(arguments.repeats):
        losses = []
        for packing in seconds:
            _, log = setting.train(0, **stage, packing=packing)
            seconds[packing] += [line["seconds_step"] for line in log.lines[2:]]
            losses.append([line["loss"] for line in log.lines])
        differences += [abs(one - other) for one, other in zip(*losses, strict=True)]
    lengths = [len(row["input_ids"]) for row in setting.train_rows[: 64 * arguments.steps]]
    longest = [max(lengths[first : first + 64]) for first in range(0, len(lengths), 64)]
    return {
        "padding": 1 - sum(lengths) / (64 * sum(longest)),
        "padded": statistics.median(seconds[False]),
        "packed": statistics.median(seconds[True]),
        "difference": max(differences),
    }


if __name__ == "__main__":
    main()
