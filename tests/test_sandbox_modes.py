"""What is left of the protections on systems that allow less: no namespaces, no root, neither."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOBODY = 65534
MARK = f"mark-of-modes-{os.getpid()}"
PROGRAMS = """
fork_bomb memory_at_once memory_little_by_little tcp unix_sockets kill_parent kill_everybody kill_every_number ptrace
read_other_memory environment read_secrets write_outside delete_harness sleep daemon huge_output namespaces mounts
keyring io_uring message_queues inherited_descriptors pickle raise_limits endless_succession other_architecture
""".split()  # noqa: SIM905

DRIVER = '''
import json, os, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from rewards import sandbox
from rewards.sandbox.jail import kernel, seccomp

request = json.loads(sys.stdin.read())
if not request["namespaces"]:  # as a container does it: unshare is not permitted
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.load([(0x20, 0, 0, 0), (0x15, 0, 1, 272), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)])
if not request["landlock"]:
    seccomp.load([(0x20, 0, 0, 0), (0x15, 0, 1, 444), (6, 0, 0, 0x50026), (6, 0, 0, 0x7FFF0000)])
main = """
import os, runpy, sys
here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, here)
runpy.run_path(here + "/hostile.py", run_name="__main__")
"""
facts = json.dumps({**request["facts"], "caller": os.getpid(), "harness": sys.argv[1]}).encode() + b"\\n"
limits = sandbox.Limits(wall_seconds=1.5, cpu_seconds=1, memory_mib=128, processes=8)
results = {}
for name, text in request["programs"].items():
    files = {"main.py": main, "hostile.py": text, "prelude.py": request["prelude"]}
    try:
        execution = sandbox.Execution(files, arguments=[request["mark"]], stdin=facts, limits=limits)
        (outcome,) = sandbox.run_together([execution])
    except sandbox.SandboxError as error:
        results[name] = {"error": f"{type(error).__name__}: {error}"}
        continue
    ended = f"exit {outcome.exit_code}" if outcome.reason == "exit" else outcome.reason
    printed = (outcome.stdout + outcome.stderr).decode(errors="replace")
    results[name] = {"ended": ended, "printed": printed, "active": dict(outcome.protections.active)}
verdict = None
try:
    tests = "assert f(1) == 2\\nassert f(2) == 3"
    good = sandbox.examine("def f(x):\\n    return x + 1", tests, limits=limits)
    forged = sandbox.examine("print('OK')\\ndef f(x):\\n    return 0", tests, limits=limits)
    verdict = [good.passed, forged.passed]
except sandbox.SandboxError:
    pass
found = sandbox.protections()
print(json.dumps({"results": results, "verdict": verdict, "describe": found.describe(), "active": dict(found.active),
                  "uncovered": sandbox.uncovered()}))
'''


@pytest.fixture(scope="module")
def everybodys() -> Iterator[tuple[str, Path]]:
    """An interpreter and a copy of the package that an unprivileged user can read."""
    temporary = tempfile.TemporaryDirectory()
    directory = Path(temporary.name)
    directory.chmod(0o755)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "rewards", directory / "rewards", ignore=ignore)
    (directory / "posttrain").mkdir()
    for name in ("__init__.py", "errors.py", "imports.py"):
        shutil.copy(ROOT / "posttrain" / name, directory / "posttrain")
    for interpreter in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        check = "import sys; sys.exit(sys.version_info < (3, 11))"
        try:
            done = subprocess.run([interpreter, "-c", check], cwd="/", check=False, **as_user(NOBODY))
        except OSError:
            continue
        if done.returncode == 0:
            yield interpreter, directory
            temporary.cleanup()
            return
    temporary.cleanup()
    pytest.skip("no Python 3.11 here that an unprivileged user may read")


def as_user(uid: int) -> dict[str, Any]:
    return {"user": uid, "group": uid, "extra_groups": []} if os.getuid() == 0 else {}


def drive(everybodys: tuple[str, Path], uid: int, programs: list[str], **system: bool) -> dict[str, Any]:
    interpreter, directory = everybodys
    folder = Path(__file__).parent / "sandbox_programs"
    secret, open_directory = directory / "secret.txt", directory / "open"
    secret.write_text("a secret")
    open_directory.mkdir(exist_ok=True)
    open_directory.chmod(0o777)
    with subprocess.Popen(["sleep", "600"], **as_user(uid)) as bystander:
        facts = {
            "bystander": bystander.pid, "port": 9, "unix": "/none", "abstract": "none", "secret": str(secret),
            "open": str(open_directory),
        }  # fmt: skip
        request = {
            "namespaces": True, "landlock": True, **system, "facts": facts, "mark": MARK,
            "programs": {name: (folder / f"{name}.py").read_text() for name in programs},
            "prelude": (folder / "prelude.py").read_text(),
        }  # fmt: skip
        done = subprocess.run(
            [interpreter, "-c", DRIVER, str(directory)], input=json.dumps(request), text=True, capture_output=True,
            cwd="/", timeout=300, check=False, env={"A_SECRET": "secret"}, **as_user(uid),
        )  # fmt: skip
        alive = bystander.poll() is None
        bystander.kill()
    assert done.returncode == 0, done.stderr
    assert alive and list(open_directory.iterdir()) == []
    return json.loads(done.stdout)


def assert_contained(found: dict[str, Any]) -> None:
    for name, result in found["results"].items():
        assert "error" not in result, (name, result)
        # A traceback shows the line that would have said it.
        said = [line for line in result["printed"].splitlines() if line.startswith("ESCAPED")]
        assert not said, (name, said)
        assert result["ended"] != "exit 0" or "contained" in result["printed"] or name == "kill_everybody", name


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@needs_root
def test_root_without_namespaces(everybodys: tuple[str, Path]) -> None:
    """A container without privileges: another user, Landlock, seccomp and limits are left."""
    found = drive(everybodys, 0, PROGRAMS, namespaces=False)
    assert_contained(found)
    assert set(found["active"]) == {"user", "limits", "capabilities", "landlock", "seccomp"}
    assert found["uncovered"] == [] and found["verdict"] == [2, 0]
    assert "MISSING: mounts, processes, network" in found["describe"]
    assert "the system allows no namespaces: Operation not permitted" in found["describe"]
    assert left_behind() == []


def test_a_user_with_namespaces(everybodys: tuple[str, Path]) -> None:
    found = drive(everybodys, NOBODY, PROGRAMS)
    if "mounts" not in found["active"]:
        pytest.skip(f"user namespaces are not allowed here: {found['describe']}")
    assert_contained(found)
    assert found["active"]["user"] == "namespace"
    assert found["uncovered"] == [] and found["verdict"] == [2, 0]
    assert "MISSING" not in found["describe"]


def test_a_user_without_namespaces(everybodys: tuple[str, Path]) -> None:
    """Programs have the caller's user, so they may not start or signal any process."""
    found = drive(everybodys, NOBODY, PROGRAMS, namespaces=False)
    assert_contained(found)
    assert set(found["active"]) == {"limits", "capabilities", "landlock", "seccomp"}
    assert found["uncovered"] == [] and found["verdict"] == [2, 0]
    assert found["results"]["kill_everybody"]["ended"] == "exit 1"
    assert left_behind() == []


@pytest.mark.parametrize("uid", [pytest.param(0, marks=needs_root), NOBODY])
def test_nothing_is_run_where_files_cannot_be_protected(everybodys: tuple[str, Path], uid: int) -> None:
    found = drive(everybodys, uid, ["environment", "tcp"], namespaces=False, landlock=False)
    assert found["uncovered"] == ["files"] and found["verdict"] is None
    for result in found["results"].values():
        assert result["error"].startswith("NotIsolated: nothing keeps programs from files: ")
        assert "landlock (" in result["error"]


@needs_root
def test_root_with_an_interpreter_that_only_root_can_read_needs_namespaces(everybodys: tuple[str, Path]) -> None:
    _, directory = everybodys
    with tempfile.TemporaryDirectory(dir="/var/tmp") as private:  # for the owner alone
        interpreter = f"{private}/python3"
        shutil.copy(os.path.realpath(everybodys[0]), interpreter)
        assert_contained(drive((interpreter, directory), 0, ["environment"]))
        with pytest.raises(AssertionError, match="cannot be read by the unprivileged user that programs run as"):
            drive((interpreter, directory), 0, ["environment"], namespaces=False)


@needs_root
def test_python_below_the_programs_own_directory_costs_the_root_of_their_own(everybodys: tuple[str, Path]) -> None:
    _, directory = everybodys
    interpreter = directory / "python3"
    shutil.copy(os.path.realpath(everybodys[0]), interpreter)
    found = drive((str(interpreter), directory), 0, ["environment", "tcp", "read_secrets", "write_outside", "daemon"])
    assert_contained(found)
    assert "processes" in found["active"] and "mounts" not in found["active"] and found["uncovered"] == []
    assert "MISSING: mounts (Python lies below /tmp" in found["describe"]


def left_behind() -> list[str]:
    """Command lines of programs that this process has had run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if MARK.encode() in command:
            found.append(command.decode(errors="replace"))
    return found
