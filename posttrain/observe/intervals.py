"""95 % intervals of an accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054


def binomial_interval(correct: float, n: float) -> tuple[float, float]:
    """The Wilson 95 % score interval of `correct` successes in `n` trials; (0, 1) for no trials.

    Wilson (1927): the p for which |p_hat - p| <= z sqrt(p (1 - p) / n). Unlike the normal interval it keeps
    its coverage near 0 and 1 and for small n, and stays inside [0, 1].
    """
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} successes in {n} trials")
    if n == 0:
        return 0.0, 1.0
    share = correct / n
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + (Z95 / (2 * n)) ** 2)
    return (0.0 if correct == 0 else max(0.0, centre - half)), (1.0 if correct == n else min(1.0, centre + half))


def accuracy_interval(problem_means: Sequence[float], samples: int = 1) -> tuple[float, float]:
    """The 95 % interval of the mean of `problem_means`, each the share of right answers among `samples` to one problem.

    Answers to one problem are not independent, so the problem is the unit: the Wilson interval at the effective
    number of trials n p (1 - p) / var(problem_means), which lies between the number of problems n (all answers to a
    problem agree) and n * samples. With one sample a problem it is `binomial_interval`.
    """
    n = len(problem_means)
    if n == 0:
        return 0.0, 1.0
    share = min(1.0, max(0.0, math.fsum(problem_means) / n))
    variance = math.fsum((mean - share) ** 2 for mean in problem_means) / n
    spread = share * (1 - share)
    if spread == 0:  # all right or all wrong: nothing is known of the agreement within a problem
        return binomial_interval(share * n, n)
    trials = float(n * samples) if variance * samples <= spread else max(float(n), n * spread / variance)
    return binomial_interval(min(share * trials, trials), trials)


def difference_interval(
    first: float, first_interval: Sequence[float], second: float, second_interval: Sequence[float]
) -> tuple[float, float]:
    """The 95 % interval of `second - first`, two shares that were measured apart, each with its 95 % interval.

    Newcombe (1998), method 10: the distances from each share to the nearer bound, added as squares. Where both were
    measured on the same problems the true interval is narrower, because hard problems are hard for both.
    """
    (low_1, high_1), (low_2, high_2) = first_interval, second_interval
    difference = second - first
    below = math.hypot(second - low_2, high_1 - first)
    above = math.hypot(high_2 - second, first - low_1)
    return max(-1.0, difference - below), min(1.0, difference + above)
