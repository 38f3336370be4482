"""What a divergence is asked for, and what is written down about each token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


class Summary:
    """Rows of the `[COUNT, N]` fp32 matrix with a column for each token."""

    DIVERGENCE, STUDENT_ENTROPY, TEACHER_ENTROPY = 0, 1, 2
    SAME_TOP = 3
    """1 where both models prefer the same token, the lowest on a tie, else 0."""
    ANCHOR = 4
    """What the gradient subtracts: KL(p ‖ q) for the reverse KL, KL(p ‖ m) for a mixture m."""
    STUDENT_LOG_MASS, TEACHER_LOG_MASS = 5, 6
    COUNT = 7


@dataclass(frozen=True)
class Form:
    """A divergence, and the functions that work on its tiles."""

    tiles: Any
    """`plain`, or the Triton kernels."""
    beta: float
    """0: KL(q ‖ p), forward. 1: KL(p ‖ q), reverse. Between: the mixture m = (1 - beta) p + beta q."""
    inverse_temperature: float
    metrics: bool
    """Whether the teacher's entropy and the agreement are wanted (kernels fill them in either case)."""

    @property
    def is_mixture(self) -> bool:
        return 0 < self.beta < 1

    @property
    def slope(self) -> float:
        """The factor of the gradient that all tokens share."""
        return self.inverse_temperature * (1 - self.beta if self.is_mixture else 1)

    @property
    def log_shares(self) -> tuple[float, float]:
        """Logs of the student's and of the teacher's share in the mixture; no matter where there is none."""
        return (math.log1p(-self.beta), math.log(self.beta)) if self.is_mixture else (0.0, 0.0)
