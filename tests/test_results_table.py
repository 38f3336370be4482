"""Tables of several runs from their reports."""

from __future__ import annotations

from typing import Any

from scripts.results_table import accuracy_table, own_domains_only, stages_table


def accuracy(share: float, length: float) -> dict[str, Any]:
    return {"pass@1": share, "ci95": [share - 0.1, share + 0.1], "n": 50, "mean_length": length}


def report_of(seed: int, own_domain: bool) -> dict[str, Any]:
    def sums(share: float) -> dict[str, Any]:
        return accuracy(share, 9.0) | {"modes": {"chat": accuracy(share, 3.0), "high": accuracy(share + 0.2, 15.0)}}

    words = {} if own_domain else {"words": accuracy(0.1, 4.0)}
    models = [
        {"name": "base", "eval": {"sums": sums(0.1), "words": accuracy(0.1, 4.0)}},
        {"name": "expert/sums/sft", "eval": {"sums": sums(0.3), **words}},
        {"name": "expert/sums/grpo", "eval": {"sums": sums(0.5), **words}},
        {"name": "expert/words/sft", "eval": {"words": accuracy(0.4, 5.0)}},
    ]
    return {"seed": seed, "models": models}


def test_experts_on_their_own_domain_are_a_row_for_each_mode_and_seed() -> None:
    reports = [report_of(0, own_domain=True), report_of(1, own_domain=True)]
    assert own_domains_only(reports[0])
    lines = stages_table(reports).splitlines()
    assert lines[0] == "| domain | mode | seed | base | sft | grpo |"
    cells = ["10.0 (0.0–20.0), 3.0 tokens", "30.0 (20.0–40.0), 3.0 tokens", "50.0 (40.0–60.0), 3.0 tokens"]
    assert lines[2] == f"| sums | chat | 0 | {' | '.join(cells)} |"
    assert lines[5].startswith("| sums | high | 1 | 30.0 ") and len(lines) == 8
    assert lines[7].endswith("| 1 | 10.0 (0.0–20.0), 4.0 tokens | 40.0 (30.0–50.0), 5.0 tokens | – |")


def test_every_model_on_every_domain_is_a_column_for_each_domain_and_seed() -> None:
    report = report_of(0, own_domain=False)
    report["models"].pop()
    assert not own_domains_only(report)
    lines = accuracy_table([report]).splitlines()
    assert lines[0] == "| model | sums, seed 0 | words, seed 0 |"
    assert lines[3] == "| expert/sums/sft | 30.0 (20.0–40.0) | 10.0 (0.0–20.0) |"
