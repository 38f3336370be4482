"""What a trainer actor is asked to do, and what it answers. Plain data: it travels between Ray actors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from posttrain.recipe.schema import RolloutConfig
from posttrain.recipe.stages import GrpoStage, OpdStage, SftStage
from posttrain.recipe.student import teaching
from posttrain.snapshots import Origin

if TYPE_CHECKING:
    from rollouts.environments import Episodes


@dataclass(frozen=True)
class Prompt:
    """A problem as the policy sees it: token ids, never text."""

    problem_id: str
    domain: str
    token_ids: tuple[int, ...]
    effort: str | None = None
    """The mode that it is asked in, for domains that have any."""
    max_new_tokens: int | None = None
    """The mode's budget; default: the job's."""


class Reward(Protocol):
    """Scores completions: one reward each, and named parts of it for the log. It has to survive pickling.

    Of an episode it is given the tokens that the model sampled; each turn ends with its end token.

    NaN marks a completion that could not be scored: nothing is learned from it.
    """

    def __call__(
        self, problem_ids: Sequence[str], completion_ids: Sequence[Sequence[int]], finish_reasons: Sequence[str]
    ) -> tuple[list[float], list[dict[str, float]]]: ...


@runtime_checkable
class AsksModel(Protocol):
    """A reward that may ask the model itself."""

    def ask_through(self, client: Any, name: str) -> None:
        """From here on `client` serves the model; ids of requests begin with `name`."""


def bind_reward(reward: Reward | None, client: Any, stage: str) -> None:
    """Have a stage's reward ask the stage's own rollout workers, if it asks the model at all."""
    if isinstance(reward, AsksModel):
        reward.ask_through(client, f"{stage}/judge")


@dataclass(frozen=True)
class SnapshotPlan:
    """Snapshots that a stage is to write (`posttrain.snapshots`), and the one that it goes on from."""

    directory: str
    every: int
    """Steps."""
    keep: int
    origin: Origin
    resume: str | None = None
    """The snapshot's directory; None: the stage begins at its start."""


@dataclass(frozen=True)
class SftJob:
    stage: str
    config: SftStage
    checkpoint: str
    """The directory to start from."""
    output: str
    """The directory to write; it appears when it is complete."""
    rows: Sequence[Mapping[str, Sequence[int]]]
    """`input_ids` and `labels`, -100 where there is no loss (`posttrain.data.rows.sft_rows`)."""
    snapshots: SnapshotPlan | None = None
    """None: the stage writes none."""


@dataclass(frozen=True)
class GrpoJob:
    stage: str
    config: GrpoStage
    checkpoint: str
    output: str
    prompts: Sequence[Prompt]
    """In the order of use; reshuffled and repeated when a stage needs more."""
    max_new_tokens: int
    reward: Reward
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    first_version: int = 0
    """Published weights get higher versions than this one; see `posttrain.stages.grpo.first_version`."""
    episodes: Episodes | None = None
    """Problems that are conversations with an environment; `max_new_tokens` are then those of a whole episode."""
    snapshots: SnapshotPlan | None = None


@dataclass(frozen=True)
class Teacher:
    """Who teaches a domain, alone or with others."""

    name: str
    """In metrics."""
    checkpoint: str
    """A directory, or a URL."""
    weight: float = 1.0
    """Against the domain's other teachers."""
    outside: bool = False
    """It was not trained by this run: it is looked at more closely (`distill.canary`)."""
    first_step: int = 1
    last_step: int | None = None
    """It teaches from the one to the other, both included; None: to the end."""


@dataclass(frozen=True)
class OpdJob:
    stage: str
    config: OpdStage
    checkpoint: str
    output: str
    prompts: Mapping[str, Sequence[Prompt]]
    """For each domain, in the order of use."""
    teachers: Mapping[str, str | Sequence[Teacher]]
    """For each domain, the directory of its expert, or several teachers."""
    max_new_tokens: Mapping[str, int]
    reward: Reward | None = None
    """Scores the student's samples for the log; the loss does not see it."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    first_version: int = 0
    episodes: Episodes | None = None
    snapshots: SnapshotPlan | None = None

    def teachers_of(self, domain: str, step: int | None = None) -> Sequence[Teacher]:
        """Who teaches a domain in a step (from 1); None: in any."""
        found = self.teachers[domain]
        teachers = [Teacher(domain, found)] if isinstance(found, str) else found
        return teachers if step is None else teaching(teachers, step)

    def all_teachers(self) -> list[Teacher]:
        """Of all domains."""
        return [teacher for domain in sorted(self.prompts) for teacher in self.teachers_of(domain)]


@dataclass
class StageResult:
    """What a stage did. `tokens` counts the tokens trained on (SFT: answers; else: sampled)."""

    stage: str
    checkpoint: str
    steps: int
    seconds: float
    tokens: int
    metrics: dict[str, float]
    """The last metrics line."""
    max_abs_logprob_diff: float | None = None
    """Largest |trainer - sampler| log-probability over the stage's tokens of the weights that they trained."""
    k3: float | None = None
    """KL(sampler || trainer) by the k3 estimator, the mean over the same tokens."""
    weight_sync_seconds: list[float] = field(default_factory=list)
    off_policy: dict[str, float] = field(default_factory=dict)
    """Over the whole stage: importance ratios and, with `rollout.mode: async`, how old the tokens were."""
    waited_seconds: float | None = None
    """Time in which the trainer waited for samples."""
    sampling_seconds: float = 0.0
    """Time in which samples were asked for and learned from: the stage without its start and end."""
