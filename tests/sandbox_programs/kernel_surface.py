# Calls with a history of holes, and those of administrators.
# ends: exit 0
import ctypes

from prelude import attempt, system_call

calls = {
    "bpf": 321,
    "perf_event_open": 298,
    "userfaultfd": 323,
    "kexec_load": 246,
    "init_module": 175,
    "delete_module": 176,
    "reboot": 169,
    "swapon": 167,
    "acct": 163,
    "settimeofday": 164,
    "sethostname": 170,
    "quotactl": 179,
    "iopl": 172,
    "ioperm": 173,
    "modify_ldt": 154,
    "personality": 135,
    "vmsplice": 278,
    "splice": 275,
    "tee": 276,
    "fanotify": 300,
    "open_by_handle_at": 304,
    "name_to_handle_at": 303,
    "process_madvise": 440,
    "move_pages": 279,
    "lookup_dcookie": 212,
    "syslog": 103,
    "vhangup": 153,
    "seccomp": 317,
    "landlock": 444,
    "pidfd_getfd": 438,
    "mbind": 237,
    "nfsservctl": 180,
    "remap_file_pages": 216,
    "signalfd4": 289,
    "timerfd_create": 283,
    "rt_sigqueueinfo": 129,
    "capset": 126,
}
data = ctypes.create_string_buffer(256)
for name, number in calls.items():
    attempt(name, lambda number=number: system_call(number, data, data, 0, 0, 0, 0))
attempt("prctl", lambda: system_call(157, 4, 1, 0, 0, 0))
