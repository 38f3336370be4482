"""The part of a recipe that says how it is learned: the stages and their optimisers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from posttrain.recipe.conversations import ConversationsConfig
from posttrain.recipe.section import Section
from posttrain.recipe.section import wrong as _wrong
from posttrain.recipe.student import GuardsConfig, Teachers, experts_or_mapping, first_untaught

Shares = dict[str, Annotated[float, Field(gt=0)]]


class OptimizerConfig(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: matrices by V4's hybrid Newton-Schulz Muon, everything else by AdamW."""
    lr: float = Field(1e-3, gt=0)
    """At its highest."""
    adamw_lr: float | None = Field(None, gt=0)
    """With `muon`, the rate of the AdamW part; default: `lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """With `adamw` of matrices, with `muon` of everything."""
    warmup_steps: int = Field(0, ge=0)
    """In which the rate rises from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the rate after that; `linear` and `cosine` end at 0."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are cut to it."""

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
    """Of each adapter."""
    alpha: int = Field(32, ge=1)
    """Adapters count alpha / rank."""
    targets: list[str] | None = Field(None, min_length=1)
    """Which matrices have adapters. Family deepseek_v4: of wq_a, wq_b, wkv, wo_a, wo_b, compressor, experts and
    shared_experts, by default all but compressor. Family hf: names of linear layers, by default all but the head."""


class SftStage(Section):
    """Supervised fine-tuning on reference answers, loss on the assistant's tokens only."""

    kind: Literal["sft"] = "sft"
    steps: int = Field(100, ge=1)
    """Updates."""
    batch_size: int = Field(64, ge=1)
    """Examples in one optimiser step."""
    shares: Shares = {}
    """Of the domains that are learned together, among the examples; 1 for those not named."""
    max_length: int = Field(256, ge=8)
    """Tokens of an example; longer ones are refused."""
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
    """Least weight."""
    max: float | None = Field(3.0, gt=0)
    """Largest weight."""

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
    """Batches of answers."""
    prompts_per_step: int = Field(16, ge=1)
    """Groups in a batch."""
    group_size: int = Field(8, ge=2)
    """Answers to a prompt."""
    shares: Shares = {}
    """Of the domains that are learned together, among the prompts; 1 for those not named."""
    updates_per_batch: int = Field(1, ge=1)
    """Optimiser steps on each generated batch (more than 1 is off-policy)."""
    temperature: float = Field(1.0, gt=0)
    """That answers are sampled at."""
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
    """How far below 1 a ratio is clipped; above, unless `epsilon_high` says otherwise."""
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
    """Keep the routers as they are."""
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


class WarmStart(SftStage):
    """Supervised fine-tuning of the student on answers that the experts sampled, before the distillation."""

    temperature: float = Field(1.0, gt=0)
    """Of the experts' sampling."""

    @model_validator(mode="after")
    def _from_experts(self) -> WarmStart:
        if self.conversations is not None:
            raise _wrong("conversations", "a warm start learns from the experts' answers; leave it out")
        return self


class OpdStage(Section):
    """On-policy distillation (V4 report eq. 29): the student samples, the sample's expert teaches."""

    kind: Literal["opd"] = "opd"
    init: Literal["base", "average", "task_arithmetic"] = "base"
    """What the student starts from: the base, the mean of the experts' weights, or the base plus `init_scale` times
    the sum of what each expert changed."""
    init_scale: float | None = Field(None, gt=0)
    """With `task_arithmetic`; default: 1 / the number of experts, which is `average`."""
    warm_start: WarmStart | None = None
    """Before it samples itself, the student learns from answers of the experts; default: it does not."""
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
    """Batches of samples."""
    batch_size: int = Field(64, ge=1)
    """Student samples in one optimiser step, over all domains."""
    temperature: float = Field(1.0, gt=0)
    """That the student samples at."""
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
    """Keep the routers as they are."""
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()

    @model_validator(mode="after")
    def _options_belong(self) -> OpdStage:
        if self.jsd_beta is not None and self.divergence != "jsd":
            raise _wrong("jsd_beta", f"is for `divergence: jsd`; {self.divergence} has no mixture")
        if self.init_scale is not None and self.init != "task_arithmetic":
            raise _wrong("init_scale", f"is for `init: task_arithmetic`; {self.init} has no scale")
        if self.top_k is not None and self.divergence in ("sampled_token", "fixed_negative"):
            raise _wrong("top_k", f"{self.divergence} looks at the sampled token only; leave it out")
        for domain, teachers in self.teachers.items():
            if (step := first_untaught(teachers, self.steps)) is not None:
                raise _wrong(f"teachers.{domain}", f"nobody teaches in step {step} of {self.steps}")
        return self


class GateConfig(Section):
    """An expert must beat its parent by `min_gain` on its domain's selection problems."""

    metric: Literal["pass@1"] = "pass@1"
    """What is compared."""
    min_gain: float = Field(0.0, ge=-1, le=1)
    """Over the parent."""
    action: Literal["stop", "warn", "drop"] = "warn"
    """Where it gains less: end the run, say so, or leave the expert out of the distillation."""


ExpertStage = Annotated[SftStage | GrpoStage, Field(discriminator="kind")]


def _each_kind_once(stages: list[ExpertStage]) -> list[ExpertStage]:
    """A stage is known by its kind (`expert/<domain>/sft`), so a kind comes once."""
    kinds = [stage.kind for stage in stages]
    for index, kind in enumerate(kinds):
        if kind in kinds[:index]:
            raise _wrong(f"[{index}]", f"a second {kind} stage; an expert has each kind of stage at most once")
    return stages


ExpertStages = Annotated[list[ExpertStage], AfterValidator(_each_kind_once)]


class ExpertsConfig(Section):
    per_domain: ExpertStages = []
    """The stages that grow an expert, in order. A domain without any has no expert: its teachers are checkpoints."""
    overrides: dict[str, ExpertStages] = {}
    """Another list of stages for single domains."""
    joint: dict[str, Annotated[list[str], Field(min_length=1)]] = {}
    """Domains that the expert of another one learns and teaches beside its own; they have none of their own."""
    gate: GateConfig = GateConfig()


class StagesConfig(Section):
    base: SftStage | None = None
    """Mixed-domain SFT from the initial weights; absent: the initial weights are the base."""
    experts: ExpertsConfig = ExpertsConfig()
    student: OpdStage | None = OpdStage()
