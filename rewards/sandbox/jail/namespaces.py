"""Namespaces, and a root directory with nothing but Python in it."""

from __future__ import annotations

import os

from . import kernel
from .plan import Plan, Report

PROGRAM = "/program"
"""Where the program's files are, read-only."""
SCRATCH = "/tmp"
"""Where it can write."""
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
DATA = ("/usr/share/zoneinfo",)
DEVICES = ("null", "zero", "full", "random", "urandom")
INSIDE_UID = 1000
_SCRATCH_INODES = 1024
_READ_ONLY = kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV


def enter(report: Report) -> bool:
    """Move this process into namespaces of its own; its next child is the first process of its pid namespace.

    Returns:
        Whether there are any.
    """
    flags = {
        "mounts": kernel.CLONE_NEWNS,
        "processes": kernel.CLONE_NEWPID,
        "network": kernel.CLONE_NEWNET,
        "ipc": kernel.CLONE_NEWIPC,
        "hostname": kernel.CLONE_NEWUTS,
        "cgroups": kernel.CLONE_NEWCGROUP,
    }
    together = sum(flags.values())
    uid, gid = os.getuid(), os.getgid()
    try:
        kernel.unshare(together if uid == 0 else together | kernel.CLONE_NEWUSER)
    except OSError as error:
        lost = flags if uid == 0 else (*flags, "user")
        report.missing |= dict.fromkeys((*lost, "memory watch"), f"the system allows no namespaces: {error.strerror}")
        return False
    report.active |= {name: "namespace" for name in flags if name != "mounts"}
    if uid != 0:
        _map_user(uid, gid, report)
    return True


def _map_user(uid: int, gid: int, report: Report) -> None:
    try:
        for name, text in (
            ("setgroups", "deny"), ("uid_map", f"{INSIDE_UID} {uid} 1"), ("gid_map", f"{INSIDE_UID} {gid} 1"),
        ):  # fmt: skip
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        report.active["user"] = "namespace"
    except OSError as error:
        report.missing["user"] = f"mapping: {error.strerror}"


def build_root(plan: Plan, report: Report) -> str | None:
    """Make a root directory with Python, its libraries, the program and a private /tmp.

    Returns:
        Where it is mounted; None if it cannot be made.
    """
    try:
        if any(path.startswith(f"{SCRATCH}/") for path in python_files(plan)):
            raise OSError(f"Python lies below {SCRATCH}, and programs get a {SCRATCH} of their own")
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        root = _free_mount_point(plan.prefix)
        size = sum(4 * len(text) + 4096 for text in plan.files.values()) + 2**20
        kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, f"size={size},mode=755")
        _fill(root, plan)
        kernel.set_mount_attributes(root, _READ_ONLY)
        scratch = f"size={plan.limits['scratch_mib']}m,nr_inodes={_SCRATCH_INODES},mode=1777"
        flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        kernel.mount("tmpfs", f"{root}{SCRATCH}", "tmpfs", flags, scratch)
        for device in DEVICES:
            kernel.mount(f"/dev/{device}", f"{root}/dev/{device}", None, kernel.MS_BIND)
            kernel.set_mount_attributes(f"{root}/dev/{device}", kernel.MS_NOSUID | kernel.MS_NOEXEC)
    except OSError as error:
        report.missing["mounts"] = str(error)
        return None
    return root


def change_root(root: str, report: Report) -> int | None:
    """In the first process of the pid namespace: nothing but what is in `root` can be reached from now on.

    Returns:
        A descriptor of the namespace's /proc, which the program does not see; None if it cannot be mounted.
    """
    processes: int | None = None
    try:
        flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        kernel.mount("proc", f"{root}/proc", "proc", flags)
        processes = os.open(f"{root}/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        kernel.detach_mount(f"{root}/proc")
    except OSError as error:  # containers hide parts of /proc, and then it cannot be mounted in a user namespace
        report.missing["memory watch"] = str(error)
    kernel.pivot_root(root)
    report.active["mounts"] = "own read-only root, private /tmp"
    return processes


def _free_mount_point(prefix: str) -> str:
    """A directory that can be hidden, because Python is not below it."""
    for candidate in ("/mnt", "/srv", "/media", "/opt", "/home", "/tmp"):
        if os.path.isdir(candidate) and not f"{prefix}/".startswith(f"{candidate}/"):
            return candidate
    raise OSError("there is no directory to build the root in")


def _fill(root: str, plan: Plan) -> None:
    for name in ("proc", "dev", SCRATCH[1:], PROGRAM[1:]):
        os.mkdir(f"{root}/{name}")
    write_program(f"{root}{PROGRAM}", plan.files)
    for device in DEVICES:
        os.close(os.open(f"{root}/dev/{device}", os.O_CREAT))
    os.symlink(SCRATCH, f"{root}/dev/shm")
    for path in python_files(plan):
        target = root + path
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
        if not os.path.isdir(path):
            os.close(os.open(target, os.O_CREAT))
        kernel.mount(path, target, None, kernel.MS_BIND | kernel.MS_REC)


def python_files(plan: Plan) -> list[str]:
    """The interpreter and what it needs of this machine's files: no other program is among them."""
    libraries = [*LIBRARIES, f"{plan.prefix}/lib", f"{plan.prefix}/lib64", *DATA]
    return [path for path in dict.fromkeys((*libraries, plan.executable)) if os.path.lexists(path)]


def write_program(directory: str, files: dict[str, str]) -> None:
    """Write the program's files; a name may have one directory in front."""
    for name, text in files.items():
        path = f"{directory}/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
