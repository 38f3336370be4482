"""The recipe: one YAML file describes a whole run, checked here before anything starts.

This module imports pydantic and nothing heavier, so that a recipe can be validated in
milliseconds and on a machine without torch. Unknown keys fail; defaults are settings that
were seen to work.
"""

# Ruff sees a pydantic model only where its base is in the same file; pydantic copies mutable defaults.

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from posttrain.recipe.consistency import check_parts
from posttrain.recipe.domains import DomainConfig
from posttrain.recipe.evaluation import EvaluationHook, HoldoutEvaluation
from posttrain.recipe.resilience import SnapshotConfig, WatchdogConfig
from posttrain.recipe.section import Section
from posttrain.recipe.section import wrong as _wrong
from posttrain.recipe.stages import GrpoStage, OpdStage, SftStage, StagesConfig
from posttrain.recipe.student import TeacherConfig

WARM_START = "student/sft"
"""The name of the stage before the student's own, for recipes that have it."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""Names of recipes and runs: they become directories."""


def _text_or_mapping(value: Any) -> Any:
    if not isinstance(value, str | dict | None):
        raise _wrong("", "expected a preset's name or a mapping of config fields")
    return value


class ModelConfig(Section):
    """What is trained. `config` starts from random weights, `checkpoint` from saved ones."""

    family: Literal["deepseek_v4", "hf"] = "deepseek_v4"
    """`deepseek_v4`: this project's model and kernels. `hf`: any causal language model of transformers."""
    config: Annotated[str | dict[str, Any] | None, BeforeValidator(_text_or_mapping)] = None
    """A preset's name (`tiny`) or the fields of a model config: random initial weights."""
    checkpoint: str | None = None
    """A directory or a hub id to start from."""
    precision: Literal["fp32", "bf16", "fp4_experts", "bf16_fp4_experts"] | None = None
    """`fp32`, `bf16`: what matrices are held in. `fp4_experts`, `bf16_fp4_experts`: the same, and routed experts are
    rounded to MXFP4 in every forward pass (quantisation-aware training; engines hold them packed). Default: the
    checkpoint's, or fp32."""
    kernels: Literal["compiled", "triton", "oracle"] | None = None
    """Implementation of the op table in trainers, teachers and native engines. Default: `compiled` on CPUs, `triton` on
    GPUs; `oracle`, plain torch, runs anywhere."""
    tokenizer: str | None = None
    """A directory or a hub id. Default: the checkpoint's, or the project's character tokenizer."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.config is None) == (self.checkpoint is None):
            raise _wrong("", "give exactly one of `config` (random weights) and `checkpoint` (saved weights)")
        if self.family == "hf" and self.precision not in (None, "fp32"):
            raise _wrong("precision", f"{self.precision} is for family deepseek_v4; for family hf leave it out")
        if self.family == "hf" and self.kernels is not None:
            raise _wrong("kernels", "is for family deepseek_v4; a model of family hf brings its own")
        if self.family == "hf" and isinstance(self.config, str):
            raise _wrong(
                "config", f"the preset {self.config!r} is one of family deepseek_v4; for family hf give a mapping"
            )
        if self.family == "hf" and self.config is not None and "model_type" not in self.config:
            raise _wrong("config.model_type", "required for family hf: the transformers model type, for example qwen3")
        return self


class ClusterConfig(Section):
    """Where the work runs. Without `address` the run starts and stops its own Ray on this machine."""

    address: str | None = None
    """Of a Ray cluster to join, as for `ray.init`; none: an own one on this machine."""
    trainers: int = Field(1, ge=1)
    """Experts grow side by side, as many as there are trainers and rollout workers."""
    rollout_workers: int = Field(1, ge=1)
    """vLLM engines."""
    teacher_workers: int = Field(1, ge=1)
    """They load teachers when their samples come."""
    teacher_memory_mib: int = Field(1024, ge=1)
    """Host memory in which each teacher worker keeps teachers; one is kept however large."""
    threads: int = Field(1, ge=1)
    """CPU threads of each actor's numerical libraries."""
    gpus_per_worker: float = Field(0, ge=0)
    """Of each trainer, rollout worker and teacher worker; a share of one will do."""
    placement: Literal["spread", "pack"] = "spread"
    """Trainers, teacher workers and rollout workers on as many nodes as possible, or on as few."""
    dashboard: bool = True
    """Ray's, of an own cluster."""
    dashboard_host: str = "127.0.0.1"
    """Where it listens; the default is this machine alone."""
    dashboard_port: int = Field(8265, ge=0, le=65535)
    """8265 means the first free port from there."""


class RolloutConfig(Section):
    """The generation engines (vLLM)."""

    engine: Literal["native", "vllm"] = "native"
    """`native`: our model on our op table inside vLLM. `vllm`: vLLM's own implementation."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What engines compute in. On GPUs the trainer's (`model.precision`), so that log-probabilities agree."""
    max_model_len: int = Field(256, ge=8)
    """Tokens of a prompt and its answer together."""
    max_num_seqs: int = Field(128, ge=1)
    """Answers that an engine samples at once."""
    max_num_batched_tokens: int = Field(2048, ge=8)
    """Tokens that an engine reads in a step; longer prompts come in chunks."""
    kv_cache_mib: int = Field(64, ge=1)
    """Of each engine."""
    mode: Literal["sync", "async"] = "sync"
    """`sync`: sample a batch, then learn from it. `async`: go on sampling while learning (docs/asynchronous.md)."""
    max_staleness: int | None = Field(None, ge=1)
    """With `async`: how many steps ahead is sampled; nothing is learned from tokens that are older. Default: 1."""
    deterministic: bool = False
    """With `async`: take groups in the order of the prompts, and update engines only when nothing runs on them, so that
    the same run gives the same tokens."""

    @property
    def steps_ahead(self) -> int:
        """How many batches are sampled beyond the one that is learned from."""
        return 0 if self.mode == "sync" else self.max_staleness or 1

    @model_validator(mode="after")
    def _options_fit(self) -> RolloutConfig:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise _wrong("max_num_batched_tokens", f"must be at least max_num_seqs, which is {self.max_num_seqs}")
        if self.mode == "sync":
            for key in ("max_staleness", "deterministic"):
                if getattr(self, key):
                    raise _wrong(key, "is for `mode: async`; with `mode: sync` nothing is ever stale, leave it out")
        return self


class Recipe(Section):
    """A whole run. Read from YAML with `posttrain.recipe.load_recipe`."""

    name: str = Field(pattern=NAME_PATTERN)
    """Of runs too, unless `--name` says otherwise: runs/<name>."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of everything that is drawn: problems, initial weights, samples."""
    model: ModelConfig
    cluster: ClusterConfig = ClusterConfig()
    rollout: RolloutConfig = RolloutConfig()
    domains: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")], DomainConfig] = Field(min_length=1)
    stages: StagesConfig
    snapshots: SnapshotConfig | None = None
    watchdog: WatchdogConfig = WatchdogConfig()
    evaluation: list[EvaluationHook] = [EvaluationHook(holdout=HoldoutEvaluation())]
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Who is told every metric, beside metrics.jsonl and Ray: files in the run directory (docs/monitoring.md)."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        check_parts(self)
        return self

    @property
    def holdouts(self) -> list[HoldoutEvaluation]:
        """The evaluations on held-out problems."""
        return [hook.holdout for hook in self.evaluation if hook.holdout is not None]

    def sft_stages(self) -> dict[str, SftStage]:
        """All SFT stages, under their keys."""
        stages = self.stages_by_key()
        return {f"stages.{key}": stage for key, stage in stages.items() if isinstance(stage, SftStage)}

    def _experts_by_key(self) -> dict[str, SftStage | GrpoStage]:
        """The experts' stages as they are written, under their keys below `stages`."""
        lists = {"per_domain": self.stages.experts.per_domain}
        lists |= {f"overrides.{domain}": listed for domain, listed in self.stages.experts.overrides.items()}
        return {
            f"experts.{name}[{index}]": stage for name, listed in lists.items() for index, stage in enumerate(listed)
        }

    def grpo_stages(self) -> list[tuple[str, GrpoStage]]:
        """All GRPO stages, with their keys below `stages`."""
        return [(key, stage) for key, stage in self._experts_by_key().items() if isinstance(stage, GrpoStage)]

    def stages_by_key(self) -> dict[str, SftStage | GrpoStage | OpdStage]:
        """The stages as they are written, under their keys below `stages`."""
        student = self.stages.student
        warm_start = student.warm_start if student is not None else None
        ours = {"base": self.stages.base, "student": student, "student.warm_start": warm_start}
        stages = {**ours, **self._experts_by_key()}
        return {key: stage for key, stage in stages.items() if stage is not None}

    def stage_names(self) -> list[str]:
        """The stages in the order in which they can run; also the names of the models that they give."""
        experts = [f"expert/{domain}/{stage.kind}" for domain in self.experts for stage in self.expert_stages(domain)]
        student = self.stages.student
        warm_start = [WARM_START] if student is not None and student.warm_start is not None else []
        return ["base", *experts, *warm_start, *(["student"] if student is not None else [])]

    @property
    def experts(self) -> list[str]:
        """The domains that have an expert of their own."""
        return [name for name in self.domains if self.expert_of(name) == name and self.expert_stages(name)]

    def expert_of(self, domain: str) -> str:
        """The expert that learns a domain: its own, or the one that learns it beside another."""
        joint = self.stages.experts.joint
        return next((expert for expert, others in joint.items() if domain in others), domain)

    def learned_by(self, expert: str) -> list[str]:
        """The domains that an expert learns, its own first."""
        return [expert, *self.stages.experts.joint.get(expert, [])]

    def expert_stages(self, domain: str) -> list[SftStage | GrpoStage]:
        """The stages that grow the expert that learns `domain`, in order."""
        experts = self.stages.experts
        return list(experts.overrides.get(self.expert_of(domain), experts.per_domain))

    def teachers_of(self, domain: str) -> list[TeacherConfig]:
        """Who teaches a domain to the student; by default the expert that learned it."""
        named = self.stages.student.teachers if self.stages.student else {}
        return named.get(domain) or [TeacherConfig(expert=self.expert_of(domain))]
