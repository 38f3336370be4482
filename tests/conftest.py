"""What every test module needs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Ray reads this once in a process. A second cluster in another mode would lose its actors before they begin.
os.environ["RAY_AUTH_MODE"] = "disabled"

# Without a GPU, Triton kernels run in Triton's interpreter. Triton reads this once, when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# Tests press Ctrl-C, in this process and in runs that they start. A shell's background job begins with it ignored.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
