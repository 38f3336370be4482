"""Results for people."""

from __future__ import annotations

from typing import Any

WIDTHS = (46, 26, 26, 18)


def show(results: dict[str, Any]) -> None:
    """Print medians, with ranges in brackets."""
    threads = f"{results['threads']} thread" + ("s" if results["threads"] > 1 else "")
    print(f"tiny V4 in fp32, {threads}, {results['environment']['processor']}")
    line("", "ours", "transformers", "ratio")
    training = results["training"]
    add_rates(f"training, {training['batch']} × {training['length']}: tokens/s", training["tokens_per_second"])
    for rollout in results["rollout"]:
        name = f"sampling, {rollout['requests']} × {rollout['new_tokens']}: tokens/s"
        add_rates(name, rollout["tokens_per_second"])
        steps = rollout["decode_step_seconds"]
        ratio = steps["transformers"]["median"] / steps["ours"]["median"]
        cells = [spread(steps[who], "{:.1f}", 1e3) for who in ("ours", "transformers")]
        line(f"decoding step of {rollout['requests']} requests: ms", *cells, f"{ratio:.2f}")
    publish, difference = results["publish"], results["logprob_difference"]
    line(f"publishing {publish['bytes'] / 2**20:.1f} MiB of weights: ms", spread(publish["seconds"], "{:.1f}", 1e3))
    line(f"max |trainer − engine| of {difference['tokens']} log-probs", f"{difference['largest']:.1e}")
    fastest = {one["tokens_per_second"]["transformers_experts"] for one in (training, *results["rollout"])}
    print(f"transformers ran its fastest experts on this machine: {', '.join(sorted(fastest))}")


def add_rates(name: str, rates: dict[str, Any]) -> None:
    """One row of a comparison."""
    line(name, spread(rates["ours"]), spread(rates["transformers"]), spread(rates["ratio"], "{:.2f}"))


def line(*cells: str) -> None:
    """A row: a name, then figures to the right."""
    name, *figures = (*cells, *[""] * (len(WIDTHS) - len(cells)))
    print(
        name.ljust(WIDTHS[0])
        + "".join(figure.rjust(width) for figure, width in zip(figures, WIDTHS[1:], strict=True)).rstrip()
    )


def spread(values: dict[str, float], form: str = "{:,.0f}", scale: float = 1.0) -> str:
    """`median [lowest–highest]`."""
    median, lowest, highest = (form.format(scale * values[key]) for key in ("median", "lowest", "highest"))
    return f"{median} [{lowest}–{highest}]"
