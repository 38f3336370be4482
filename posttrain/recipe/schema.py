"""The recipe: one YAML file describes a whole run, checked here before anything starts.

This module imports pydantic and nothing heavier, so that a recipe can be validated in
milliseconds and on a machine without torch. Unknown keys fail; defaults are settings that
were seen to work.
"""

# Ruff sees a pydantic model only where its base is in the same file; pydantic copies mutable defaults.

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from posttrain.recipe.conversations import ConversationsConfig, EnvironmentConfig
from posttrain.recipe.section import Section
from posttrain.recipe.section import wrong as _wrong
from posttrain.recipe.student import GuardsConfig, TeacherConfig, Teachers, experts_or_mapping

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""Names of recipes and runs: they become directories."""


def _text_or_mapping(value: Any) -> Any:
    if not isinstance(value, str | dict | None):
        raise _wrong("", "expected a preset's name or a mapping of config fields")
    return value


class ModelConfig(Section):
    """What is trained. `config` starts from random weights, `checkpoint` from saved ones."""

    family: Literal["deepseek_v4", "hf"] = "deepseek_v4"
    config: Annotated[str | dict[str, Any] | None, BeforeValidator(_text_or_mapping)] = None
    """A preset's name (`tiny`) or the fields of a model config: random initial weights."""
    checkpoint: str | None = None
    """A directory or a hub id to start from."""
    precision: Literal["fp32", "bf16", "fp4_experts"] | None = None
    """`fp32`, `bf16`: what matrices are held in. `fp4_experts`: fp32 masters, routed experts rounded to MXFP4 in every
    forward pass of trainer and engine (quantisation-aware training). Default: the checkpoint's, or fp32."""
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
    trainers: int = Field(1, ge=1)
    rollout_workers: int = Field(1, ge=1)
    teacher_workers: int = Field(1, ge=1)
    teacher_memory_mib: int = Field(1024, ge=1)
    """Host memory in which each teacher worker keeps teachers; one is kept however large."""
    threads: int = Field(1, ge=1)
    """CPU threads of each actor's numerical libraries."""
    gpus_per_worker: float = Field(0, ge=0)
    dashboard: bool = True
    dashboard_host: str = "127.0.0.1"
    dashboard_port: int = Field(8265, ge=0, le=65535)


class RolloutConfig(Section):
    """The generation engines (vLLM)."""

    engine: Literal["native", "vllm"] = "native"
    """`native`: our model on our op table inside vLLM. `vllm`: vLLM's own implementation."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_model_len: int = Field(256, ge=8)
    max_num_seqs: int = Field(128, ge=1)
    max_num_batched_tokens: int = Field(2048, ge=8)
    kv_cache_mib: int = Field(64, ge=1)
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


class ReasoningGymSource(Section):
    """Problems generated by reasoning-gym, scored by its own verifier."""

    reasoning_gym: str
    """The task's name, for example `chain_sum`."""
    params: dict[str, Any] = {}
    prompt: str = "{question}"
    """What the model is asked: a template over `{question}` and `{metadata[key]}` of the generated problem."""


class JsonlSource(Section):
    """One JSON object a line: `{"prompt": "...", "answer": "..."}` or `{"messages": [...], "answer": "..."}`."""

    jsonl: str
    holdout_jsonl: str | None = None
    """Held-out problems; default: split off `jsonl` by a hash of the prompt."""


class DatasetSource(Section):
    """A `datasets` data set: a hub id or a directory, with the same fields as the JSONL source."""

    dataset: str
    subset: str | None = None
    split: str = "train"
    prompt_field: str = "prompt"
    answer_field: str = "answer"


class CalculationsConfig(Section):
    min_digits: int = Field(3, ge=2, le=30)
    max_digits: int = Field(5, ge=2, le=30)
    """Of each number."""
    shapes: list[Literal["a*b", "a*b+c", "a*b-c", "(a+b)*c"]] = Field(
        ["a*b", "a*b+c", "a*b-c", "(a+b)*c"], min_length=1
    )

    @model_validator(mode="after")
    def _in_order(self) -> CalculationsConfig:
        if self.min_digits > self.max_digits:
            raise _wrong("min_digits", f"must be at most max_digits, which is {self.max_digits}")
        return self


class CalculationsSource(Section):
    """Products and sums of large numbers (`28749*9377-510=`): what a model needs a calculator for."""

    calculations: CalculationsConfig


SOURCE_KINDS = ("reasoning_gym", "jsonl", "dataset", "calculations")


def _source_kind(value: Any) -> str:
    """Which source a mapping (or a source object) describes: the one of `SOURCE_KINDS` that it has."""
    keys = value if isinstance(value, dict) else getattr(type(value), "model_fields", {})
    kinds = [kind for kind in SOURCE_KINDS if kind in keys]
    return f"<{kinds[0]}>" if len(kinds) == 1 else ""


# The brackets keep the tags apart from keys in the places that pydantic reports.
Source = Annotated[
    Annotated[ReasoningGymSource, Tag("<reasoning_gym>")]
    | Annotated[JsonlSource, Tag("<jsonl>")]
    | Annotated[DatasetSource, Tag("<dataset>")]
    | Annotated[CalculationsSource, Tag("<calculations>")],
    Discriminator(
        _source_kind,
        custom_error_type="recipe",
        custom_error_message=f"a source is a mapping with exactly one of {', '.join(SOURCE_KINDS)}",
    ),
]


def _reward_spec(value: Any) -> Any:
    if isinstance(value, str) or (
        isinstance(value, dict) and len(value) == 1 and all(isinstance(options, dict) for options in value.values())
    ):
        return value
    raise _wrong("", "a reward is a name, `package.module:function`, or `{name: {option: value}}`")


RewardSpec = Annotated[str | dict[str, dict[str, Any]], BeforeValidator(_reward_spec)]

Effort = Literal["chat", "high", "max"]
"""V4's reasoning efforts: non-think, think-high, think-max."""


class ModeConfig(Section):
    """How a domain is asked and answered with one reasoning effort (docs/effort.md)."""

    max_new_tokens: int | None = Field(None, ge=1)
    """Budget of reasoning and answer together; default: the domain's."""
    share: float = Field(1.0, gt=0)
    """Share of the mode among the problems that a stage trains on."""
    length_penalty: Annotated[
        dict[Literal["length", "effort_length"], dict[str, Any]] | None, Field(min_length=1, max_length=1)
    ] = None
    """A further part of the reward, in this mode only: `length` or `effort_length` with its options."""
    prefix: str | None = Field(None, min_length=1)
    """What stands before everything else, instead of V4's own text (which only `max` has)."""
    reasoning: str | None = None
    """What SFT shows as reasoning: `package.module:function` of a problem. Default: `reasoning` in the row."""


class DomainConfig(Section):
    """One domain: where its problems come from and what counts as a right answer."""

    source: Source
    reward: list[RewardSpec] = Field(["exact"], min_length=1)
    train: int = Field(20_000, ge=1)
    """Problems for training (of a file or data set: at most); repeated when a stage needs more."""
    selection: int = Field(256, ge=1)
    """Problems for choosing between checkpoints; never trained on."""
    holdout: int = Field(512, ge=1)
    """Problems for the reported accuracy; never trained on, never selected on."""
    max_new_tokens: int = Field(32, ge=1)
    max_running: int | None = Field(None, ge=1)
    """Answers of this domain that training has in the engines at once; default: as many as there is room for."""
    system: str | None = None
    environment: EnvironmentConfig | None = None
    """Tools, or another side of a conversation of several turns; default: one answer to the prompt."""

    modes: dict[Effort, ModeConfig] = {}
    """The reasoning efforts that the domain is trained and evaluated in; none: answers without reasoning."""

    @model_validator(mode="after")
    def _turns_fit(self) -> DomainConfig:
        turn_tokens = self.environment.turn_tokens if self.environment else None
        if turn_tokens is not None and turn_tokens > self.max_new_tokens:
            raise _wrong(
                "environment.turn_tokens", f"must be at most max_new_tokens (a whole episode), {self.max_new_tokens}"
            )
        if self.environment is not None and self.modes:
            raise _wrong(
                "modes", "a domain has either `modes` or an `environment`: episodes are played without thinking"
            )
        return self

    @property
    def efforts(self) -> list[Effort | None]:
        """The modes' names; None alone for a domain without modes."""
        return list(self.modes) or [None]

    def new_tokens(self, effort: Effort | None) -> int:
        """The most tokens of a completion in a mode."""
        return (self.modes[effort].max_new_tokens if effort else None) or self.max_new_tokens

    @property
    def longest_completion(self) -> int:
        """The most tokens of a completion in any mode."""
        return max(map(self.new_tokens, self.efforts))

    def rewards(self, effort: Effort | None) -> list[RewardSpec]:
        """The parts of the reward."""
        penalty = (self.modes[effort].length_penalty if effort else None) or {}
        return [*self.reward, *({str(name): options} for name, options in penalty.items())]


class OptimizerConfig(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: matrices by V4's hybrid Newton-Schulz Muon, everything else by AdamW."""
    lr: float = Field(1e-3, gt=0)
    adamw_lr: float | None = Field(None, gt=0)
    """With `muon`, the rate of the AdamW part; default: `lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _options_belong(self) -> OptimizerConfig:
        if self.adamw_lr is not None and self.name != "muon":
            raise _wrong("adamw_lr", "only `name: muon` has an AdamW part of its own; set `lr`")
        for key, beta in zip(("betas[0]", "betas[1]"), self.betas, strict=True):
            if not 0 <= beta < 1:
                raise _wrong(key, f"must be in [0, 1), got {beta}")
        return self


class AuxiliaryConfig(Section):
    """Objectives of parts that the main loss does not reach (docs/auxiliary.md); all off, so these parts are frozen."""

    indexer: float = Field(0.0, ge=0)
    """Weight of KL(main attention || lightning indexer), the only gradient that indexers get; 0: they are frozen."""
    balance: float = Field(0.0, ge=0)
    """Weight of the sequence-wise balance loss of the routers (V4: 1e-4)."""
    bias_update: float = Field(0.0, ge=0)
    """Step of the routers' biases towards even loads after each optimiser step (V4: 1e-3); 0: they are frozen."""

    @property
    def any_on(self) -> bool:
        """Whether anything differs from plain training."""
        return bool(self.indexer or self.balance or self.bias_update)


class SftAuxiliaryConfig(AuxiliaryConfig):
    indexer_phase: Literal["sparse", "warmup"] = "sparse"
    """`sparse`: indexers learn over the entries they chose, beside the model. `warmup`: over all, and nothing else
    learns."""

    @model_validator(mode="after")
    def _warmup_trains(self) -> SftAuxiliaryConfig:
        if self.indexer_phase == "warmup":
            if not self.indexer:
                raise _wrong("indexer", "`indexer_phase: warmup` trains the indexers only; give them a weight above 0")
            for key in ("balance", "bias_update"):
                if getattr(self, key):
                    raise _wrong(key, "`indexer_phase: warmup` trains the indexers only; the routers stay as they are")
        return self


class LoraConfig(Section):
    """Low-rank adapters instead of full training: `W + (alpha / rank) B A`, of which A and B learn (docs/lora.md)."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    targets: list[str] | None = Field(None, min_length=1)
    """Which matrices have adapters. Family deepseek_v4: of wq_a, wq_b, wkv, wo_a, wo_b, compressor, experts and
    shared_experts, by default all but compressor. Family hf: names of linear layers, by default all but the head."""


class SftStage(Section):
    """Supervised fine-tuning on reference answers, loss on the assistant's tokens only."""

    kind: Literal["sft"] = "sft"
    steps: int = Field(100, ge=1)
    batch_size: int = Field(64, ge=1)
    """Examples in one optimiser step."""
    max_length: int = Field(256, ge=8)
    conversations: ConversationsConfig | None = None
    """What is learned instead of the domains' problems: every turn of the assistant."""
    packing: bool = False
    """Lay a batch's examples end to end instead of padding them; no token sees another example, no loss changes."""
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig | None = None
    """Train adapters alone; engines and later stages get them merged. Default: every parameter."""
    freeze_router: bool = False
    """Leave the routers' matrices as they are."""
    anticipatory_routing: int = Field(0, ge=0)
    """V4's: tokens go to the experts that the model of so many updates before chooses; 0: the current model."""
    auxiliary: SftAuxiliaryConfig = SftAuxiliaryConfig()


class ImportanceConfig(Section):
    """Correction where the sampler's probabilities are not the trainer's: by rounding, or by age with `mode: async`.

    The loss of a token is multiplied by the trainer's probability over the sampler's, within bounds.
    """

    level: Literal["token", "sequence"] = "sequence"
    """`token`: each token's own ratio. `sequence`: the product over the answer, for all of its tokens."""
    bound: Literal["truncate", "mask"] = "mask"
    """What happens to ratios out of bounds. `truncate`: they become the bound. `mask`: they become 0."""
    min: float | None = Field(None, ge=0)
    max: float | None = Field(3.0, gt=0)

    @model_validator(mode="after")
    def _has_bounds(self) -> ImportanceConfig:
        if self.min is None and self.max is None:
            raise _wrong("", "give `min`, `max` or both: ratios without a bound let single tokens decide an update")
        if self.min is not None and self.max is not None and self.min >= self.max:
            raise _wrong("min", f"must be below max, which is {self.max}")
        return self


class GrpoStage(Section):
    """Group-relative policy optimisation on verified rewards."""

    kind: Literal["grpo"]
    steps: int = Field(100, ge=1)
    prompts_per_step: int = Field(16, ge=1)
    group_size: int = Field(8, ge=2)
    updates_per_batch: int = Field(1, ge=1)
    """Optimiser steps on each generated batch (more than 1 is off-policy)."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the likeliest tokens alone that have this probability together. The trainer's probabilities are then
    over the same tokens (V3.2's keep sampling mask)."""
    dynamic_sampling: int = Field(0, ge=0)
    """DAPO's: groups whose answers all have the same reward are replaced by further prompts, at most this many times
    `prompts_per_step` in a step; 0: they stay, and teach nothing."""
    beta: float = Field(0.0, ge=0)
    """Strength of the KL penalty against the reference; 0: none."""
    beta_by_domain: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Another strength for single domains."""
    unbiased_kl: bool = True
    """Weigh the penalty with the policy's ratio (V3.2, eq. 7): its gradient is then that of the reverse KL."""
    reference_every: int | None = Field(None, ge=1)
    """After every so many steps the policy becomes the reference. Default: the stage's initial policy stays it."""
    epsilon: float = Field(0.2, gt=0)
    epsilon_high: float | None = Field(None, gt=0)
    """Upper clipping distance (DAPO: 0.28); default: `epsilon`. With `cispo` the largest ratio itself (ScaleRL: 5)."""
    ratio_level: Literal["token", "sequence"] = "token"
    """What is clipped: each token's ratio, or (GSPO) the geometric mean over the answer."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "group", "cispo"] = "dapo"
    """What a mean is taken over. `grpo`: each answer's tokens, then answers. `dapo`, `bnpo`: the batch's tokens.
    `group`: each prompt's tokens, then prompts. `dr_grpo`: a constant, so that long answers weigh more. `cispo`: as
    `dapo`, with clipped ratios as weights of the log-likelihood."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the group's standard deviation, the batch's, or (Dr. GRPO) nothing."""
    mask_truncated: bool = False
    """Learn nothing from answers that were cut off (DAPO's overlong filtering)."""
    off_policy_threshold: float | None = Field(None, gt=0)
    """V3.2, eq. 9: learn nothing from answers worse than their group's mean whose tokens became less likely by more
    than this many nats on average since they were sampled."""
    keep_routing: bool = False
    """V3.2's keep routing: the trainer sends every token to the experts that it went to in the engine."""
    importance: ImportanceConfig = ImportanceConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-4)
    lora: LoraConfig | None = None
    freeze_router: bool = False
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()

    def for_domain(self, domain: str) -> GrpoStage:
        """The stage with the domain's own strength of the penalty, where it has one."""
        return self.model_copy(update={"beta": self.beta_by_domain.get(domain, self.beta)})

    @model_validator(mode="after")
    def _options_belong(self) -> GrpoStage:
        if self.loss_type == "cispo" and (self.epsilon_high is None or self.epsilon_high < 1):
            raise _wrong(
                "epsilon_high", "with `loss_type: cispo` it is the largest ratio itself: give 1 or more, say 5"
            )
        if self.reference_every is not None and not any((self.beta, *self.beta_by_domain.values())):
            raise _wrong("reference_every", "there is no reference without a penalty: set beta or beta_by_domain")
        return self


class OpdStage(Section):
    """On-policy distillation (V4 report eq. 29): the student samples, the sample's expert teaches."""

    kind: Literal["opd"] = "opd"
    init: Literal["base", "average", "task_arithmetic"] = "base"
    """What the student starts from: the base, the mean of the experts' weights, or the base plus `init_scale` times
    the sum of what each expert changed."""
    init_scale: float | None = Field(None, gt=0)
    """With `task_arithmetic`; default: 1 / the number of experts, which is `average`."""
    teachers: Annotated[dict[str, Teachers], BeforeValidator(experts_or_mapping)] = {}
    """Who teaches a domain other than its own expert (`experts`: nobody). Several teach every sample together: their
    divergences are averaged by their weights."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "sampled_token", "fixed_negative"] = "reverse_kl"
    """The last two are for comparisons: an estimate of the reverse KL from sampled tokens alone, and a control that
    makes all sampled tokens less likely (docs/distillation.md)."""
    divergence_temperature: float = Field(1.0, gt=0)
    """Of both distributions in the divergence; `temperature` is that of sampling."""
    jsd_beta: float | None = Field(None, gt=0, lt=1)
    """Share of the teacher in the mixture; default: 0.5."""
    top_k: int | None = Field(None, ge=1)
    """Compare only the teacher's k likeliest tokens, and all others as if they were one; default: every token."""
    hidden_dtype: Literal["bfloat16"] | None = None
    """Round teachers' hidden states to it on the way; default: the teacher's own precision."""
    steps: int = Field(100, ge=1)
    batch_size: int = Field(64, ge=1)
    """Student samples in one optimiser step, over all domains."""
    temperature: float = Field(1.0, gt=0)
    mask_truncated: bool = False
    """Learn nothing from answers that were cut off."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Loss weight w_i of each domain's teacher; default 1."""
    normalise_kl: bool = False
    """Divide each domain's divergence by its running mean (and multiply by the mean of all), so that a teacher that
    is far away does not drown the others."""
    shares: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Share of each domain among the samples; default: equal."""
    adaptive_shares: float = Field(0.0, ge=0)
    """Shares are multiplied by (a domain's running divergence / the mean of all) to this power, at most 4 times more
    or less; 0: they are fixed."""
    guards: GuardsConfig = GuardsConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)
    lora: LoraConfig | None = None
    freeze_router: bool = False
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()

    @model_validator(mode="after")
    def _options_belong(self) -> OpdStage:
        if self.jsd_beta is not None and self.divergence != "jsd":
            raise _wrong("jsd_beta", f"is for `divergence: jsd`; {self.divergence} has no mixture")
        if self.init_scale is not None and self.init != "task_arithmetic":
            raise _wrong("init_scale", f"is for `init: task_arithmetic`; {self.init} has no scale")
        if self.top_k is not None and self.divergence in ("sampled_token", "fixed_negative"):
            raise _wrong("top_k", f"{self.divergence} looks at the sampled token only; leave it out")
        return self

    def teachers_of(self, domain: str) -> list[TeacherConfig]:
        """Who teaches a domain."""
        return self.teachers.get(domain, [TeacherConfig(expert=domain)])


class GateConfig(Section):
    """An expert must beat its parent by `min_gain` on its domain's selection problems."""

    metric: Literal["pass@1"] = "pass@1"
    min_gain: float = Field(0.0, ge=-1, le=1)
    action: Literal["stop", "warn", "drop"] = "warn"


ExpertStage = Annotated[SftStage | GrpoStage, Field(discriminator="kind")]


def _each_kind_once(stages: list[ExpertStage]) -> list[ExpertStage]:
    """A stage is known by its kind (`expert/<domain>/sft`), so a kind comes once."""
    kinds = [stage.kind for stage in stages]
    for index, kind in enumerate(kinds):
        if kind in kinds[:index]:
            raise _wrong(f"[{index}]", f"a second {kind} stage; an expert has each kind of stage at most once")
    return stages


ExpertStages = Annotated[list[ExpertStage], Field(min_length=1), AfterValidator(_each_kind_once)]


class ExpertsConfig(Section):
    per_domain: ExpertStages
    overrides: dict[str, ExpertStages] = {}
    """Another list of stages for single domains."""
    gate: GateConfig = GateConfig()


class StagesConfig(Section):
    base: SftStage | None = None
    """Mixed-domain SFT from the initial weights; absent: the initial weights are the base."""
    experts: ExpertsConfig
    student: OpdStage | None = OpdStage()


class HoldoutEvaluation(Section):
    n: int = Field(256, ge=1)
    """Held-out problems of each domain."""
    samples: int = Field(1, ge=1)
    """Answers sampled for each problem; pass@1 is their mean."""
    temperature: float = Field(1.0, ge=0)


class EvaluationHook(Section):
    holdout: HoldoutEvaluation


class Recipe(Section):
    """A whole run. Read from YAML with `posttrain.recipe.load_recipe`."""

    name: str = Field(pattern=NAME_PATTERN)
    seed: int = Field(0, ge=0, lt=2**31)
    model: ModelConfig
    cluster: ClusterConfig = ClusterConfig()
    rollout: RolloutConfig = RolloutConfig()
    domains: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")], DomainConfig] = Field(min_length=1)
    stages: StagesConfig
    evaluation: list[EvaluationHook] = [EvaluationHook(holdout=HoldoutEvaluation())]

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        student = self.stages.student
        named: dict[str, Mapping[str, object]] = {
            "stages.experts.overrides": self.stages.experts.overrides,
            "stages.student.weights": student.weights if student else {},
            "stages.student.shares": student.shares if student else {},
            "stages.student.teachers": student.teachers if student else {},
            **{f"stages.{key}.beta_by_domain": stage.beta_by_domain for key, stage in self._grpo_stages()},
        }
        for key, mapping in named.items():
            for domain in mapping:
                if domain not in self.domains:
                    raise _wrong(f"{key}.{domain}", f"no such domain; the domains are {', '.join(self.domains)}")
        for domain, teachers in student.teachers.items() if student else ():
            for index, teacher in enumerate(teachers):
                if teacher.expert is not None and teacher.expert not in self.domains:
                    raise _wrong(
                        f"stages.student.teachers.{domain}[{index}].expert",
                        f"no such domain; the domains are {', '.join(self.domains)}",
                    )
        if self.model.family == "hf" and self.rollout.engine == "native":
            raise _wrong("rollout.engine", "must be vllm for `model.family: hf`; the native engine is for deepseek_v4")
        if self.model.family == "deepseek_v4" and self.rollout.engine == "vllm" and not self.cluster.gpus_per_worker:
            raise _wrong(
                "rollout.engine",
                "vLLM's own DeepSeek-V4 does not run on CPUs (vLLM 0.32: its kernels for metadata are written in "
                "Triton, which has no CPU backend): use native, or give each worker a GPU (cluster.gpus_per_worker)",
            )
        for key, stage in self._grpo_stages():
            if stage.keep_routing and (self.model.family, self.rollout.engine) != ("deepseek_v4", "native"):
                raise _wrong(
                    f"stages.{key}.keep_routing",
                    "only `rollout.engine: native` of `model.family: deepseek_v4` returns the experts that tokens "
                    "went to; leave it out",
                )
            conversing = [
                name
                for name, domain in self.domains.items()
                if domain.environment and stage in self.expert_stages(name)
            ]
            if conversing and (stage.keep_routing or stage.top_p < 1):
                raise _wrong(
                    f"stages.{key}.{'keep_routing' if stage.keep_routing else 'top_p'}",
                    f"is for single answers; domain {conversing[0]} has an environment",
                )
            if stage.top_p < 1 and self.model.family == "hf":
                raise _wrong(
                    f"stages.{key}.top_p", "must be 1 for family hf: its trainer looks at the whole vocabulary"
                )
        if self.model.precision == "bf16" and self.rollout.dtype != "bfloat16":
            raise _wrong(
                "rollout.dtype", "must be bfloat16 for `model.precision: bf16`, so that engine and trainer agree"
            )
        self._check_routers()
        self._check_lora()
        for name, domain_config in self.domains.items():
            self._check_sizes(name, domain_config)
        return self

    def sft_stages(self) -> dict[str, SftStage]:
        """All SFT stages, under their keys."""
        stages = {"base": self.stages.base, **self._experts_by_key()}
        return {f"stages.{key}": stage for key, stage in stages.items() if isinstance(stage, SftStage)}

    def _experts_by_key(self) -> dict[str, SftStage | GrpoStage]:
        """The experts' stages as they are written, under their keys below `stages`."""
        lists = {"per_domain": self.stages.experts.per_domain}
        lists |= {f"overrides.{domain}": listed for domain, listed in self.stages.experts.overrides.items()}
        return {
            f"experts.{name}[{index}]": stage for name, listed in lists.items() for index, stage in enumerate(listed)
        }

    def _grpo_stages(self) -> list[tuple[str, GrpoStage]]:
        return [(key, stage) for key, stage in self._experts_by_key().items() if isinstance(stage, GrpoStage)]

    def stages_by_key(self) -> dict[str, SftStage | GrpoStage | OpdStage]:
        """The stages as they are written, under their keys below `stages`."""
        stages = {"base": self.stages.base, "student": self.stages.student, **self._experts_by_key()}
        return {key: stage for key, stage in stages.items() if stage is not None}

    def _check_routers(self) -> None:
        """Indexers and biased routers are parts of this project's own model; a frozen router has no objectives."""
        for key, stage in self.stages_by_key().items():
            options = {
                "auxiliary": stage.auxiliary.any_on,
                "freeze_router": stage.freeze_router,
                "anticipatory_routing": isinstance(stage, SftStage) and stage.anticipatory_routing,
            }
            for option, on in options.items():
                if on and self.model.family == "hf":
                    raise _wrong(
                        f"stages.{key}.{option}",
                        "is about parts that only `model.family: deepseek_v4` has; leave it out for family hf",
                    )
            for objective in ("balance", "bias_update"):
                if stage.freeze_router and getattr(stage.auxiliary, objective):
                    raise _wrong(f"stages.{key}.auxiliary.{objective}", "trains routers that `freeze_router` freezes")

    def _check_lora(self) -> None:
        """Adapters alone learn, by AdamW."""
        for key, stage in self.stages_by_key().items():
            if stage.lora is None:
                continue
            if stage.optimizer.name == "muon":
                raise _wrong(f"stages.{key}.optimizer.name", "the factors of `lora` are trained by adamw; set adamw")
            for part in ("indexer", "bias_update"):
                if getattr(stage.auxiliary, part):
                    raise _wrong(
                        f"stages.{key}.auxiliary.{part}",
                        "changes weights of the base model; with `lora` these stay as they are",
                    )

    def _check_sizes(self, name: str, domain: DomainConfig) -> None:
        for index, hook in enumerate(self.evaluation):
            if hook.holdout.n > domain.holdout:
                raise _wrong(
                    f"evaluation[{index}].holdout.n",
                    f"asks for {hook.holdout.n} held-out problems; domains.{name}.holdout is {domain.holdout}",
                )
        for effort in domain.efforts:
            if domain.new_tokens(effort) >= self.rollout.max_model_len:
                place = f".modes.{effort}" if effort and domain.modes[effort].max_new_tokens else ""
                raise _wrong(
                    f"domains.{name}{place}.max_new_tokens",
                    f"leaves no room for a prompt: rollout.max_model_len is {self.rollout.max_model_len}",
                )

    def stage_names(self) -> list[str]:
        """The stages in the order in which they can run; also the names of the models that they give."""
        experts = [f"expert/{domain}/{stage.kind}" for domain in self.domains for stage in self.expert_stages(domain)]
        return ["base", *experts, *(["student"] if self.stages.student else [])]

    def expert_stages(self, domain: str) -> list[SftStage | GrpoStage]:
        """The stages that grow the expert of `domain`, in order."""
        return list(self.stages.experts.overrides.get(domain, self.stages.experts.per_domain))
