# The tree of mounts stays as it is.
# ends: exit 0
import ctypes
import os

from prelude import attempt, system_call

tmpfs, place, dot = (ctypes.c_char_p(text) for text in (b"tmpfs", b"/tmp", b"."))
attempt("mount", lambda: system_call(165, tmpfs, place, tmpfs, 0, 0))
attempt("remount", lambda: system_call(165, tmpfs, ctypes.c_char_p(b"/"), tmpfs, 32 | 4096, 0))
attempt("umount", lambda: system_call(166, place, 2))
attempt("pivot_root", lambda: system_call(155, dot, dot))
attempt("chroot", lambda: os.chroot("/tmp"))
attempt("open_tree", lambda: system_call(428, -100, place, 1))
attempt("fsopen", lambda: system_call(430, tmpfs, 0))
attempt("mount_setattr", lambda: system_call(442, -100, place, 0, 0, 0))
