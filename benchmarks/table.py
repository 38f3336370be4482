"""Results for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show(results: dict[str, Any]) -> None:
    """Print the results as a table: medians, with ranges in brackets."""
    table = Table(title="Tiny V4, fp32, " + f"{results['threads']} thread" + ("s" if results["threads"] > 1 else ""))
    for column in ("", "ours", "transformers", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    training = results["training"]
    name = f"training, {training['batch']} × {training['length']}, tokens/s"
    add_rates(table, name, training["tokens_per_second"])
    for rollout in results["rollout"]:
        name = f"{rollout['requests']} requests × {rollout['new_tokens']} tokens"
        add_rates(table, f"sampling, {name}, tokens/s", rollout["tokens_per_second"])
        steps = rollout["decode_step_seconds"]
        ratio = steps["transformers"]["median"] / steps["ours"]["median"]
        cells = [spread(steps[who], "{:.1f}", 1e3) for who in ("ours", "transformers")]
        table.add_row(f"decoding step, {rollout['requests']} requests, ms", *cells, f"{ratio:.2f}")
    publish = results["publish"]
    size = publish["bytes"] / 2**20
    table.add_row(f"publishing {size:.1f} MiB of weights, ms", spread(publish["seconds"], "{:.1f}", 1e3), "", "")
    difference = results["logprob_difference"]
    table.add_row(
        f"max |trainer − engine| log-prob, {difference['tokens']} tokens", f"{difference['largest']:.1e}", "", ""
    )
    Console().print(table)


def add_rates(table: Table, name: str, rates: dict[str, Any]) -> None:
    """One row of a comparison."""
    theirs = f"{spread(rates['transformers'])} {rates['transformers_experts']}"
    table.add_row(name, spread(rates["ours"]), theirs, spread(rates["ratio"], "{:.2f}"))


def spread(values: dict[str, float], form: str = "{:,.0f}", scale: float = 1.0) -> str:
    """`median [lowest–highest]`."""
    median, lowest, highest = (form.format(scale * values[key]) for key in ("median", "lowest", "highest"))
    return f"{median} [{lowest}–{highest}]"
