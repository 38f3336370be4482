"""Stages that end in their middle and go on from a snapshot: the same losses and the same weights, to the bit."""

from __future__ import annotations

import copy
import json
import shutil
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from posttrain.data import DomainData
from posttrain.errors import BadInput
from posttrain.observe.metrics import read_metrics
from posttrain.recipe import Recipe
from posttrain.recipe.schema import RolloutConfig
from posttrain.recipe.stages import GrpoStage, OpdStage, SftStage
from posttrain.rundir import RunDirectory
from posttrain.snapshots import Origin, check_origin, damage, newest_good, snapshots_in
from posttrain.stages.work import Work
from posttrain.trainers import snapshots as trainer_snapshots
from posttrain.trainers.actor import TrainerActor
from posttrain.trainers.grpo import train_grpo
from posttrain.trainers.jobs import GrpoJob, OpdJob, SftJob, SnapshotPlan
from posttrain.trainers.opd import train_opd
from posttrain.trainers.progress import Progress
from posttrain.trainers.sft import SftTrainer, train_sft
from rollouts.types import FinishedGroup, GroupRequest
from tests.pipeline_kit import contents
from tests.test_auxiliary_training import tiny_v4
from tests.test_sft_packing import examples
from tests.test_trainers_actor import RECIPE as ACTOR_RECIPE
from tests.test_trainers_actor import ROWS
from tests.test_trainers_opd import LIMITS, TEXTS, LocalTeachers
from tests.trainers_kit import LocalClient, Recorder, prompts, save, tiny_model, tiny_tokenizer

STEPS, KILLED_AT = 9, 7
ORIGIN = Origin(inputs="r", code="c")
MUON = {"name": "muon", "lr": 5e-3, "adamw_lr": 2e-3, "schedule": "cosine", "warmup_steps": 2}
ASYNC = RolloutConfig(mode="async", deterministic=True, max_staleness=2)


class Killed(BaseException):
    """The process is gone."""


class Mortal(Progress):
    """Dies in the middle of a step."""

    dies_at: int | None = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self.dies_at is not None and state.global_step // self.updates_per_step + 1 == self.dies_at:
            raise Killed


class LoggedClient(LocalClient):
    """A service with a log: whatever was finished once is not sampled again."""

    def __init__(self, model: torch.nn.Module, log: dict[str, FinishedGroup]) -> None:
        super().__init__(model)
        self.log = log

    def submit(self, groups: Sequence[GroupRequest]) -> None:
        self.finished |= {group.id: self.log[group.id] for group in groups if group.id in self.log}
        super().submit([group for group in groups if group.id not in self.log])

    def step(self) -> None:
        super().step()
        self.log |= self.finished

    def acknowledge(self, ids: Sequence[str]) -> None:
        super().acknowledge(ids)
        for group_id in ids:
            self.log.pop(group_id, None)


class Trial:
    """A stage's lives. `train(model, progress, plan)` is one of them; what it needs is made anew for each."""

    def __init__(self, directory: Path, updates: int = 1) -> None:
        self.directory = directory
        self.recorder = Recorder()
        self.updates = updates

    def live(
        self, model: torch.nn.Module, train: Callable[..., Any], dies_at: int | None = None, every: int = 2
    ) -> Any:
        torch.manual_seed(11)
        progress = Mortal(self.recorder, "stage", STEPS, self.updates)
        progress.dies_at = dies_at
        found = newest_good(self.directory, pytest.fail)
        resume = None if found is None else str(found.path)
        train(model, progress, SnapshotPlan(str(self.directory), every, 2, ORIGIN, resume))
        return model

    @property
    def losses(self) -> dict[int, float]:
        """The last loss of each step."""
        return {int(line["step"]): line["loss"] for line in self.recorder.lines}


def assert_lossless(make: Callable[[], Any], train: Callable[..., Any], directory: Path, updates: int = 1) -> None:
    """A life without snapshots, and two lives, the first of which ends in the middle of a step."""
    plain, whole = Trial(directory / "none", updates), Trial(directory / "whole", updates)
    expected = plain.live(make(), train, every=100)
    assert not snapshots_in(plain.directory)
    assert same(expected, whole.live(make(), train))
    killed = Trial(directory / "killed", updates)
    with pytest.raises(Killed):
        killed.live(make(), train, dies_at=KILLED_AT)
    assert [one.step for one in snapshots_in(killed.directory)] == [6, 4]
    shutil.rmtree(killed.directory / "step-00000006")  # so that more than the step that was cut short is done again
    found = killed.live(make(), train)
    steps = [line["step"] for line in killed.recorder.lines]
    assert steps == [*range(1, KILLED_AT), *range(5, STEPS + 1)]
    assert killed.losses == plain.losses and len(set(plain.losses.values())) > STEPS // 2
    assert same(expected, found)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def dropping_out() -> torch.nn.Module:
    """A model that draws random numbers while it learns."""
    model = tiny_model(0)
    assert isinstance(model.config, Qwen3Config)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    return model


SFT: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any]]] = {
    "random numbers, several epochs": (dropping_out, {"optimizer": {"lr": 1e-2, "schedule": "linear"}}),
    "routed ahead, moving biases, Muon": (
        tiny_v4,
        {"optimizer": MUON, "anticipatory_routing": 2, "auxiliary": {"bias_update": 1e-3, "balance": 1e-4}},
    ),
    "adapters, packed": (tiny_v4, {"optimizer": {"lr": 1e-2}, "packing": True, "lora": {"rank": 2, "alpha": 4}}),
}


@pytest.mark.parametrize("name", SFT)
def test_supervised_fine_tuning_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    make, options = SFT[name]
    config = SftStage(steps=STEPS, batch_size=4, max_length=48, **options)
    rows = examples(4 * STEPS if make is tiny_v4 else 17)

    def made() -> torch.nn.Module:
        model = make()
        if config.lora is not None:
            from posttrain.trainers.lora import add_adapters

            add_adapters(model, config.lora, "stage")
        return model

    def train(model: Any, progress: Progress, plan: SnapshotPlan) -> None:
        train_sft(model, tiny_tokenizer(), rows, config, 0, progress, plan)

    assert_lossless(made, train, tmp_path)


def vowels(problem_ids: Sequence[str], completion_ids: Sequence[Sequence[int]], reasons: Sequence[str]) -> Any:
    return [float(sum(token % 3 == 0 for token in ids)) for ids in completion_ids], [{} for _ in completion_ids]


GRPO = {
    "sync, two updates, a reference that follows": (
        RolloutConfig(),
        {"updates_per_batch": 2, "beta": 0.05, "reference_every": 2},
    ),
    "async, replaced groups": (ASYNC, {"dynamic_sampling": 2, "optimizer": MUON}),
}


@pytest.mark.parametrize("name", GRPO)
def test_reinforcement_learning_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    rollout, options = GRPO[name]
    config = GrpoStage(**({"kind": "grpo", "steps": STEPS, "prompts_per_step": 2, "group_size": 2} | options))
    log: dict[str, FinishedGroup] = {}
    texts = ["what?", "say something", "a", "hello 1234", "b="]

    def train(model: Any, progress: Progress, plan: SnapshotPlan) -> None:
        if plan.resume is None:
            log.clear()
        client = LoggedClient(copy.deepcopy(model), log)
        job = GrpoJob("stage", config, "", "", prompts("d", texts), 4, vowels, rollout, snapshots=plan)
        train_grpo(model, tiny_tokenizer(), job, client, 5, progress)
        if plan.resume is not None:
            assert min(client.versions) == 5, "it begins with the weights of the snapshot after step 4"

    assert_lossless(lambda: tiny_model(0), train, tmp_path, config.updates_per_batch)


def test_the_log_may_forget_what_no_snapshot_that_is_kept_comes_before(tmp_path: Path) -> None:
    client = LoggedClient(tiny_model(0), {})
    config = GrpoStage(kind="grpo", steps=STEPS, prompts_per_step=2, group_size=2)
    plan = SnapshotPlan(str(tmp_path), 2, 2, ORIGIN)
    job = GrpoJob("stage", config, "", "", prompts("d", ["what?", "a"]), 4, vowels, snapshots=plan)
    train_grpo(tiny_model(0), tiny_tokenizer(), job, client, 5, Progress(None, "stage", STEPS))
    assert [one.step for one in snapshots_in(tmp_path)] == [8, 6]
    assert client.acknowledged == [f"stage/{step}/{row}" for step in range(6) for row in range(2)]


@pytest.mark.parametrize("rollout", [RolloutConfig(), ASYNC], ids=["sync", "async"])
def test_distillation_goes_on_as_if_nothing_had_happened(rollout: RolloutConfig, tmp_path: Path) -> None:
    teachers = {name: save(tiny_model(seed), tmp_path / name) for seed, name in enumerate(sorted(TEXTS), start=1)}
    config = OpdStage(steps=STEPS, batch_size=4, adaptive_shares=1.0, normalise_kl=True, shares={"sums": 2.0})
    log: dict[str, FinishedGroup] = {}

    def train(model: Any, progress: Progress, plan: SnapshotPlan) -> None:
        if plan.resume is None:
            log.clear()
        supply = {domain: prompts(domain, texts) for domain, texts in TEXTS.items()}
        job = OpdJob("stage", config, "", "", supply, teachers, LIMITS, rollout=rollout, snapshots=plan)
        train_opd(model, tiny_tokenizer(), job, LoggedClient(copy.deepcopy(model), log), LocalTeachers(), 3, progress)

    assert_lossless(lambda: tiny_model(0), train, tmp_path)


@pytest.fixture(scope="module")
def two_snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a stage that was cut short in its seventh step."""
    directory = tmp_path_factory.mktemp("snapshots")
    with pytest.raises(Killed):
        Trial(directory).live(tiny_model(0), sft_of_letters, dies_at=KILLED_AT)
    return directory


def sft_of_letters(model: Any, progress: Progress, plan: SnapshotPlan) -> None:
    train_sft(model, tiny_tokenizer(), examples(16), SftStage(steps=STEPS, batch_size=4), 0, progress, plan)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit": (lambda path: flip_a_bit(path / "state.pt"), "the SHA-256 of state.pt is not that of what was written"),
    "a cut": (lambda path: (path / "state.pt").write_bytes(b"short"), "state.pt has 5 bytes"),
    "a file gone": (lambda path: (path / "trainer_state.json").unlink(), "trainer_state.json cannot be read"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    "torn manifest": (lambda path: (path / "manifest.json").write_text('{"schema": 1'), "manifest.json is damaged"),
    "another's manifest": (
        lambda path: shutil.copy(path.parent / "step-00000004" / "manifest.json", path),
        "its name says step 6",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_snapshot_is_refused_and_the_one_before_it_used(
    kind: str, two_snapshots: Path, tmp_path: Path
) -> None:
    damaged, message = DAMAGES[kind]
    directory = shutil.copytree(two_snapshots, tmp_path / "stage")
    damaged(directory / "step-00000006")
    said: list[str] = []
    found = newest_good(directory, said.append)
    assert found is not None and found.step == 4
    (text,) = said
    assert message in text and f"{directory / 'step-00000006'} is damaged and not used" in text
    if kind != "another's manifest":
        damaged(directory / "step-00000004")
        assert newest_good(directory, said.append) is None


def test_what_comes_after_a_damaged_snapshot_takes_its_place(two_snapshots: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(two_snapshots, tmp_path / "stage")
    flip_a_bit(directory / "step-00000006" / "state.pt")
    plan = SnapshotPlan(str(directory), 5, 2, ORIGIN, str(directory / "step-00000004"))
    sft_of_letters(tiny_model(0), Progress(None, "stage", STEPS), plan)
    assert [one.step for one in snapshots_in(directory)] == [5, 4]
    assert not list(directory.glob(".*"))
    assert all(damage(one) is None for one in snapshots_in(directory))


def test_what_an_interrupted_write_left_is_no_snapshot(two_snapshots: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(two_snapshots, tmp_path / "stage")
    (directory / "step-00000006").rename(directory / ".step-00000008.abcd")
    found = newest_good(directory, pytest.fail)
    assert found is not None and found.step == 4
    assert [path.name for path in directory.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        (Origin(inputs="other", code="c"), "was made from another recipe"),
        (Origin(inputs="r", code="newer"), "was made by another version of posttrain's code"),
    ],
)
def test_another_recipe_or_code_does_not_go_on_from_it(origin: Origin, message: str, two_snapshots: Path) -> None:
    check_origin(two_snapshots, ORIGIN)
    with pytest.raises(BadInput, match=message) as caught:
        check_origin(two_snapshots, origin)
    assert f"remove {two_snapshots} to begin the stage stage again" in str(caught.value)


def test_a_full_disk_costs_a_snapshot_and_not_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    trial = Trial(tmp_path / "stage")
    monkeypatch.setattr(trainer_snapshots.shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1 << 20))
    expected = trial.live(tiny_model(0), sft_of_letters, every=4)
    assert not snapshots_in(trial.directory)
    told = [event["message"] for event in trial.recorder.events]
    assert [str(text).split(":")[0] for text in told] == ["no snapshot after step 4", "no snapshot after step 8"]
    assert "1 MiB free on the disk" in str(told[0])
    monkeypatch.undo()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    other = Trial(tmp_path / "other")
    assert same(expected, other.live(tiny_model(0), sft_of_letters, every=4))
    assert "No space left on device" in str(other.recorder.events[0]["message"])
    assert not list(other.directory.iterdir())


def test_no_code_is_run_from_a_snapshot(two_snapshots: Path, tmp_path: Path) -> None:
    """Whoever can also mend the manifest still cannot have a pickle of his own executed."""
    directory = shutil.copytree(two_snapshots, tmp_path / "stage") / "step-00000006"

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "owned",)

    torch.save({"model": Payload()}, directory / "state.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        sft_of_letters(
            tiny_model(0), Progress(None, "stage", STEPS), SnapshotPlan(str(tmp_path), 2, 2, ORIGIN, str(directory))
        )
    assert not (tmp_path / "owned").exists()
    assert json.loads((directory / "manifest.json").read_text())["schema"] == 1


def stage_of_a_run(directory: Path, snapshots: dict[str, int] | None) -> tuple[Work, Callable[..., Any]]:
    """A run whose base is trained by an actor's methods in this process, and what `Work.stage` calls for it."""
    fields = {**ACTOR_RECIPE, "stages": {**ACTOR_RECIPE["stages"], "base": {"steps": STEPS, "batch_size": 4}}}
    recipe = Recipe.model_validate({**fields, "snapshots": snapshots})
    path = directory / "run"
    run = RunDirectory.open(path) if path.exists() else RunDirectory.create(directory, "run", recipe)
    actor, config = TrainerActor(0, recipe.model_dump_json(), str(run.path)), recipe.stages.base
    assert config is not None
    start = str(directory / "start")
    if not Path(start).exists():
        save(tiny_model(0), Path(start))

    def do(output: str, plan: SnapshotPlan | None) -> Callable[[], Any]:
        return lambda: actor.sft(SftJob("base", config, start, output, ROWS, plan))

    domains = {"letters": DomainData([], [], [])}
    return Work(recipe, run, domains, tiny_tokenizer(), None), do  # type: ignore[arg-type]


def test_a_runs_stage_begins_at_its_snapshot_and_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.stages.work.wait", lambda train, log: train())
    plain, do = stage_of_a_run(tmp_path / "plain", None)
    expected = contents(plain.stage("base", STEPS, do))
    assert not plain.run.snapshots_path("base").exists()
    plain.run.close()

    original = SftTrainer.training_step

    def dies(self: SftTrainer, *arguments: Any) -> Any:
        if self.state.global_step + 1 == KILLED_AT:
            raise Killed
        return original(self, *arguments)

    work, do = stage_of_a_run(tmp_path / "killed", {"every": 2})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SftTrainer, "training_step", dies)
        work.stage("base", STEPS, do)
    work.run.close()
    flip_a_bit(work.run.snapshots_path("base") / "step-00000006" / "state.pt")

    again, do = stage_of_a_run(tmp_path / "killed", {"every": 2})
    assert contents(again.stage("base", STEPS, do)) == expected
    assert not again.run.snapshots_path("base").exists()
    records = read_metrics(again.run.path / "metrics.jsonl")
    assert [one.get("step", 0) for one in records if one.get("event") == "stage_started"] == [0, 4]
    (warning,) = [one["message"] for one in records if one.get("event") == "warning"]
    assert "step-00000006 is damaged and not used: the SHA-256 of state.pt" in warning
    assert [one["step"] for one in records if "metrics" in one] == [*range(1, KILLED_AT), *range(5, STEPS + 1)]
    again.run.close()
