"""`posttrain doctor RECIPE`: everything that a run relies on, tried before the run spends anything."""

from posttrain.doctor.examination import examine
from posttrain.doctor.verdicts import Verdict

__all__ = ["Verdict", "examine"]
