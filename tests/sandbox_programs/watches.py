# Watches on files, of which a user has a number in common.
# ends: exit 0
from prelude import attempt, system_call

attempt("inotify_init", lambda: system_call(253))
attempt("inotify_init1", lambda: system_call(294, 0))
attempt("fanotify_init", lambda: system_call(300, 0, 0))
