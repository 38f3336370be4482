"""What every test module needs."""

from __future__ import annotations

import os

# Ray reads this once in a process. A second cluster in another mode would lose its actors before they begin.
os.environ["RAY_AUTH_MODE"] = "disabled"
