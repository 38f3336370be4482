"""Make .venv from nothing but Python 3.11: `python3 scripts/setup.py [cpu|cuda]`, or `make setup`.

Installs exactly what requirements/{cpu,cuda}.txt pins, then this project in editable form, which gives
.venv/bin/posttrain. Does nothing when .venv is current. Uses the standard library only.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "posttrain-setup"
EXTRAS = ("cpu", "cuda")
UV = "uv==0.13.9"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EXPECTED_TIME = {"cpu": "about 1 GB to download; 1 to 5 minutes", "cuda": "about 8 GB to download; 5 to 20 minutes"}
IMPORT_CHECK = "import torch, transformers, ray, vllm; print(f'torch {torch.__version__}, vLLM {vllm.__version__}')"


def main(arguments: list[str]) -> int:
    """Set up unless current. Exit code: 0 ready, 2 this machine or the arguments do not fit, 1 an install failed."""
    if len(arguments) > 1 or (arguments and arguments[0] not in EXTRAS):
        return complain(f"what to install is one of {', '.join(EXTRAS)}; got {' '.join(arguments)!r}", 2)
    extra = arguments[0] if arguments else installed_extra()
    stamp = f"{extra} {fingerprint(extra)}"
    if is_current(stamp):
        return 0
    if sys.version_info[:2] != (3, 11):
        return use_python_311(arguments)
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        machine = f"{platform.system()} on {platform.machine()}"
        return complain(f"the pinned packages are those of Linux on x86_64; this is {machine}", 2)
    began = time.monotonic()
    print(f"Setting up .venv for {extra} ({EXPECTED_TIME[extra]}).", flush=True)
    try:
        install(extra)
    except subprocess.CalledProcessError as failure:
        return complain(
            f"this command failed with exit code {failure.returncode}:\n  {' '.join(map(str, failure.cmd))}\n"
            "Its output stands above. Nothing needs undoing: mend the cause and run the same command again.",
            1,
        )
    except KeyboardInterrupt:
        return complain("interrupted; the same command goes on with it", 130)
    temporary = STAMP.with_suffix(".new")
    temporary.write_text(stamp + "\n")
    os.replace(temporary, STAMP)
    print(f"Ready after {time.monotonic() - began:.0f} s. The command line is .venv/bin/posttrain.", flush=True)
    return 0


def complain(message: str, code: int) -> int:
    """Print `message` as an error and return `code`."""
    print(f"setup: {message}", file=sys.stderr, flush=True)
    return code


def use_python_311(arguments: list[str]) -> int:
    """Start again under a python3.11 of the PATH, or say that it is needed."""
    other = shutil.which("python3.11")
    if other and subprocess.run([other, "-c", "pass"], capture_output=True).returncode == 0:
        return subprocess.run([other, __file__, *arguments]).returncode
    return complain(
        "Python 3.11 is needed: every pinned package was chosen for it.\n"
        f"This is Python {platform.python_version()} ({sys.executable}), and there is no python3.11 on the PATH.\n"
        "Install it, or name it: make setup PYTHON=/path/to/python3.11",
        2,
    )


def installed_extra() -> str:
    """What an earlier set-up installed; `cpu` without one."""
    words = STAMP.read_text().split() if STAMP.is_file() else []
    return words[0] if words and words[0] in EXTRAS else "cpu"


def fingerprint(extra: str) -> str:
    """A hash of everything that decides what .venv holds."""
    digest = hashlib.sha256(str(VENV).encode())
    for path in (ROOT / "requirements" / f"{extra}.txt", ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_current(stamp: str) -> bool:
    """Whether .venv was completed with this stamp and its interpreter is still there."""
    command = VENV / "bin" / "posttrain"
    return STAMP.is_file() and STAMP.read_text().strip() == stamp and PYTHON.exists() and command.exists()


def install(extra: str) -> None:
    """Create .venv where needed and install torch, the locked packages and the project. Raises CalledProcessError."""
    STAMP.unlink(missing_ok=True)
    if VENV.exists() and subprocess.run([PYTHON, "-c", "import pip"], capture_output=True).returncode != 0:
        say("Removing .venv, which is broken")
        shutil.rmtree(VENV)
    if not VENV.exists():
        say("Creating .venv")
        run([sys.executable, "-m", "venv", VENV])
    lock = ROOT / "requirements" / f"{extra}.txt"
    installer = Installer()
    if extra == "cpu":
        install_cpu_torch(installer, pins(lock)["torch"])
    say(f"Installing the {len(pins(lock))} packages of {lock.relative_to(ROOT)}")
    installer.install("-r", lock)
    say("Installing this project")
    installer.install("--no-build-isolation", "-e", ROOT)
    say("Checking that the large packages load", end=": ")
    run([PYTHON, "-c", IMPORT_CHECK], VLLM_LOGGING_LEVEL="ERROR")


def install_cpu_torch(installer: Installer, version: str) -> None:
    """Install the CPU build of torch: plain `torch` is the CUDA build, several GB that a CPU has no use for.

    The configured indexes come first, since a mirror or a wheel directory may have the build; PyTorch's own index
    of CPU builds is asked only when they have none.
    """
    say(f"Installing torch {version} (CPU build)")
    if not installer.install(f"torch=={version}+cpu", check=False):
        installer.install(f"torch=={version}+cpu", "--index-url", TORCH_CPU_INDEX, own_indexes=False)


def pins(lock: Path) -> dict[str, str]:
    """The version of every package that `lock` pins."""
    lines = [line for line in lock.read_text().splitlines() if "==" in line and not line.startswith("#")]
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


class Installer:
    """Installs into .venv without dependencies: by uv where it can be had (three times as fast), else by pip."""

    def __init__(self) -> None:
        self._pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "-q"]
        configuration = subprocess.run([PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
        self._indexes, self._environment = uv_settings(configuration)
        self._uv: list[str] = []
        if subprocess.run([*self._pip, UV], capture_output=True).returncode == 0:
            self._uv = [str(VENV / "bin" / "uv"), "pip", "install", "--python", str(PYTHON), "--no-deps"]
            # pip compiles as well; without it every worker of a first run would compile for itself.
            self._uv += ["--compile-bytecode"] if sys.stderr.isatty() else ["--compile-bytecode", "--quiet"]

    def install(self, *what: str | Path, check: bool = True, own_indexes: bool = True) -> bool:
        """Whether `what` was installed. With `check`, pip's failure raises CalledProcessError."""
        if self._uv:
            command = [*self._uv, *(self._indexes if own_indexes else []), *what]
            environment = {**os.environ, **self._environment}
            if subprocess.run(command, env=environment, capture_output=not check).returncode == 0:
                return True
            if check:
                print("  uv could not; trying pip", flush=True)
        result = subprocess.run([*self._pip, *what], capture_output=not check)
        if check:
            result.check_returncode()
        return result.returncode == 0


def uv_settings(pip_configuration: str) -> tuple[list[str], dict[str, str]]:
    """pip's settings of where packages come from, as options and environment of uv, which reads neither pip's.

    `pip_configuration` is what `pip config list` prints: `section.key='value'` lines, files before the environment,
    where a later line overrides an earlier one.
    """
    settings: dict[str, str] = {}
    for line in pip_configuration.splitlines():
        key, separator, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if separator and section in ("global", "install", ":env:"):
            # `install` is more special than `global`, and the environment than either.
            rank = ("global", "install", ":env:").index(section)
            settings.update({f"{rank}{name}": str(ast.literal_eval(value))})
    chosen = {name[1:]: value for name, value in sorted(settings.items())}
    # pip takes the best version of all indexes, uv by default the first index that knows the name.
    options = ["--index-strategy", "unsafe-best-match"]
    for name in ("index-url", "extra-index-url", "find-links"):
        for value in chosen.get(name, "").split():
            options += [f"--{name}", value]
    if chosen.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    for host in chosen.get("trusted-host", "").split():
        options += ["--allow-insecure-host", host]
    environment = {"UV_HTTP_TIMEOUT": chosen.get("default-timeout", chosen.get("timeout", "120"))}
    if "cert" in chosen:
        environment["SSL_CERT_FILE"] = chosen["cert"]
    if "proxy" in chosen:
        environment["ALL_PROXY"] = chosen["proxy"]
    return options, environment


def say(message: str, end: str = "\n") -> None:
    """Print one step of the set-up."""
    print(f"  {message}", end=end, flush=True)


def run(command: list[str | Path], **environment: str) -> None:
    """Run `command`; raise CalledProcessError where it fails."""
    subprocess.run(command, check=True, env={**os.environ, **environment})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
