# No real-time scheduling, no higher priority, no choice of processors.
# ends: exit 0
import os

from prelude import attempt, system_call

attempt("SCHED_FIFO", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50)))
attempt("nice", lambda: os.nice(-10))
attempt("affinity", lambda: os.sched_setaffinity(0, {0}))
attempt("ioprio", lambda: system_call(251, 1, 0, 1 << 13))
