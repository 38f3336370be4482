"""Whether the parts of a recipe fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from posttrain.recipe.section import wrong
from posttrain.recipe.stages import GrpoStage, OpdStage, SftStage

if TYPE_CHECKING:
    from posttrain.recipe.domains import DomainConfig
    from posttrain.recipe.schema import Recipe


def check_parts(recipe: Recipe) -> None:
    """Raise pydantic's error, with the key that it belongs to, for the first thing that does not fit."""
    _check_domains_named(recipe)
    _check_joint(recipe)
    _check_experts(recipe)
    _check_judges(recipe)
    _check_judge_evaluations(recipe)
    _check_engine(recipe)
    for key, stage in recipe.grpo_stages():
        _check_sampling(recipe, f"stages.{key}", stage)
    _check_routers(recipe)
    _check_lora(recipe)
    for name, domain in recipe.domains.items():
        _check_sizes(recipe, name, domain)


def _check_domains_named(recipe: Recipe) -> None:
    """Domains that other parts name are there."""
    known = f"no such domain; the domains are {', '.join(recipe.domains)}"
    student = recipe.stages.student
    named: dict[str, Mapping[str, object]] = {
        "stages.experts.overrides": recipe.stages.experts.overrides,
        "stages.student.weights": student.weights if student else {},
        "stages.student.shares": student.shares if student else {},
        "stages.student.teachers": student.teachers if student else {},
        **{
            f"stages.{key}.shares": stage.shares
            for key, stage in recipe.stages_by_key().items()
            if not isinstance(stage, OpdStage)
        },
        **{f"stages.{key}.beta_by_domain": stage.beta_by_domain for key, stage in recipe.grpo_stages()},
    }
    for key, mapping in named.items():
        for domain in mapping:
            if domain not in recipe.domains:
                raise wrong(f"{key}.{domain}", known)
    for domain, teachers in student.teachers.items() if student else ():
        for index, teacher in enumerate(teachers):
            if teacher.expert is not None and teacher.expert not in recipe.domains:
                raise wrong(f"stages.student.teachers.{domain}[{index}].expert", known)


def _check_joint(recipe: Recipe) -> None:
    """Domains that an expert learns beside its own are there, once, and are nobody's own."""
    experts = recipe.stages.experts
    known = f"no such domain; the domains are {', '.join(recipe.domains)}"
    owners: dict[str, str] = {}
    for expert, others in experts.joint.items():
        if expert not in recipe.domains:
            raise wrong(f"stages.experts.joint.{expert}", known)
        for index, domain in enumerate(others):
            where = f"stages.experts.joint.{expert}[{index}]"
            if domain not in recipe.domains:
                raise wrong(where, known)
            if domain in experts.joint:
                raise wrong(where, f"{domain} has an expert of its own, which learns {experts.joint[domain]} beside it")
            if domain in owners:
                raise wrong(where, f"the expert of {owners[domain]} learns {domain} already")
            owners[domain] = expert
    named = {f"stages.experts.overrides.{domain}": domain for domain in experts.overrides}
    student = recipe.stages.student
    for taught, teachers in student.teachers.items() if student else ():
        named |= {
            f"stages.student.teachers.{taught}[{index}].expert": teacher.expert
            for index, teacher in enumerate(teachers)
            if teacher.expert is not None
        }
    for where, domain in named.items():
        if domain in owners:
            raise wrong(where, f"{domain} has no expert of its own: that of {owners[domain]} learns it")


def _check_experts(recipe: Recipe) -> None:
    """What needs an expert has one; a domain without one has other teachers."""
    stages = recipe.stages
    if not recipe.experts and stages.student is None:
        raise wrong("stages.experts.per_domain", "is empty, and there is no student: give the experts stages")
    if stages.student is None:
        return
    without = [domain for domain in recipe.domains if recipe.expert_of(domain) not in recipe.experts]
    for domain in without:
        if domain not in stages.student.teachers:
            owner = recipe.expert_of(domain)
            key = f"overrides.{owner}" if owner in stages.experts.overrides else "per_domain"
            raise wrong(
                f"stages.experts.{key}",
                f"has no stage, so {domain} has no expert: give it stages, or name a checkpoint that teaches it in "
                f"stages.student.teachers.{domain}",
            )
    for domain, teachers in stages.student.teachers.items():
        for index, teacher in enumerate(teachers):
            if teacher.expert in without:
                raise wrong(
                    f"stages.student.teachers.{domain}[{index}].expert",
                    f"{teacher.expert} has no expert: stages.experts gives it no stages",
                )
    if without and stages.student.warm_start is not None:
        raise wrong("stages.student.warm_start", f"learns from experts of this run, and {without[0]} has none")
    if not recipe.experts and stages.student.init != "base":
        raise wrong("stages.student.init", "must be base: there are no experts to merge")


def _check_judges(recipe: Recipe) -> None:
    """Judge domains judge a domain that is there; rewards ask judge domains, which themselves ask nobody."""
    for name, domain in recipe.domains.items():
        judged = domain.judging.domain if domain.judging is not None else None
        if judged is not None:
            where = f"domains.{name}.source.judging.domain"
            if judged not in recipe.domains:
                raise wrong(where, f"no such domain; the domains are {', '.join(recipe.domains)}")
            if recipe.domains[judged].judging is not None:
                raise wrong(where, f"{judged} is a judge domain itself; name one whose answers can be judged")
        if domain.judging is not None and domain.environment is not None:
            raise wrong(f"domains.{name}.environment", "a judge domain has none: a verdict is a single answer")
        for index, judge, options in domain.actor_judges:
            where = f"domains.{name}.reward[{index}].rubric"
            if domain.judging is not None:
                raise wrong(where, "a judge domain is rewarded for verdicts that are right, say by `exact`")
            _check_judge(recipe, where, judge, options)


def _check_judge_evaluations(recipe: Recipe) -> None:
    """There are judge domains, with enough held out."""
    judges = {name: domain for name, domain in recipe.domains.items() if domain.judging is not None}
    for index, hook in enumerate(recipe.evaluation):
        if hook.judge is None:
            continue
        if not judges:
            raise wrong(
                f"evaluation[{index}].judge", "there is no judge domain: make one with `source: {judging: ...}`"
            )
        for name, domain in judges.items():
            if hook.judge.n > domain.holdout:
                raise wrong(
                    f"evaluation[{index}].judge.n",
                    f"asks for {hook.judge.n} held-out problems; domains.{name}.holdout is {domain.holdout}",
                )


def _check_judge(recipe: Recipe, where: str, judge: str, options: Mapping[str, object]) -> None:
    found = [name for name, one in recipe.domains.items() if one.judging is not None and one.judging.form == "single"]
    if judge not in found:
        kind = "no such domain" if judge not in recipe.domains else f"{judge} does not judge single answers"
        there = f"the judge domains are {', '.join(found)}" if found else "make one with `source: {judging: ...}`"
        raise wrong(f"{where}.judge.actor", f"{kind}; {there}")
    config, criteria = recipe.domains[judge].judging, options.get("criteria")
    assert config is not None
    if "{criterion}" not in config.template and not (isinstance(criteria, list) and len(criteria) == 1):
        raise wrong(
            f"{where}.criteria",
            f"domains.{judge}.source.judging.prompt shows no {{criterion}}: give exactly one here, or show it there",
        )


def _check_engine(recipe: Recipe) -> None:
    """The engine serves the model, in the trainer's precision."""
    family, engine = recipe.model.family, recipe.rollout.engine
    if family == "hf" and engine == "native":
        raise wrong("rollout.engine", "must be vllm for `model.family: hf`; the native engine is for deepseek_v4")
    if family == "deepseek_v4" and engine == "vllm" and not recipe.cluster.gpus_per_worker:
        raise wrong(
            "rollout.engine",
            "vLLM's own DeepSeek-V4 does not run on CPUs (vLLM 0.32: its kernels for metadata are written in "
            "Triton, which has no CPU backend): use native, or give each worker a GPU (cluster.gpus_per_worker)",
        )
    precision = recipe.model.precision or ""
    if precision.startswith("bf16") and recipe.rollout.dtype != "bfloat16":
        what = f"must be bfloat16 for `model.precision: {precision}`, so that engine and trainer agree"
        raise wrong("rollout.dtype", what)


def _check_sampling(recipe: Recipe, key: str, stage: GrpoStage) -> None:
    """What the engines are to return with samples, they can return."""
    if stage.keep_routing and (recipe.model.family, recipe.rollout.engine) != ("deepseek_v4", "native"):
        raise wrong(
            f"{key}.keep_routing",
            "only `rollout.engine: native` of `model.family: deepseek_v4` returns the experts that tokens "
            "went to; leave it out",
        )
    conversing = [
        name for name, one in recipe.domains.items() if one.environment and stage in recipe.expert_stages(name)
    ]
    if conversing and (stage.keep_routing or stage.top_p < 1):
        option = "keep_routing" if stage.keep_routing else "top_p"
        raise wrong(f"{key}.{option}", f"is for single answers; domain {conversing[0]} has an environment")
    if stage.top_p < 1 and recipe.model.family == "hf":
        raise wrong(f"{key}.top_p", "must be 1 for family hf: its trainer looks at the whole vocabulary")


def _check_routers(recipe: Recipe) -> None:
    """Indexers and biased routers are parts of this project's own model; a frozen router has no objectives."""
    for key, stage in recipe.stages_by_key().items():
        options = {
            "auxiliary": stage.auxiliary.any_on,
            "freeze_router": stage.freeze_router,
            "anticipatory_routing": isinstance(stage, SftStage) and stage.anticipatory_routing,
        }
        for option, on in options.items():
            if on and recipe.model.family == "hf":
                raise wrong(
                    f"stages.{key}.{option}",
                    "is about parts that only `model.family: deepseek_v4` has; leave it out for family hf",
                )
        for objective in ("balance", "bias_update"):
            if stage.freeze_router and getattr(stage.auxiliary, objective):
                raise wrong(f"stages.{key}.auxiliary.{objective}", "trains routers that `freeze_router` freezes")


def _check_lora(recipe: Recipe) -> None:
    """Adapters alone learn, by AdamW."""
    for key, stage in recipe.stages_by_key().items():
        if stage.lora is None:
            continue
        if stage.optimizer.name == "muon":
            raise wrong(f"stages.{key}.optimizer.name", "the factors of `lora` are trained by adamw; set adamw")
        for part in ("indexer", "bias_update"):
            if getattr(stage.auxiliary, part):
                raise wrong(
                    f"stages.{key}.auxiliary.{part}",
                    "changes weights of the base model; with `lora` these stay as they are",
                )


def _check_sizes(recipe: Recipe, name: str, domain: DomainConfig) -> None:
    """Enough is held out, and a prompt fits before the longest answer."""
    for index, hook in enumerate(recipe.evaluation):
        if hook.holdout is not None and hook.holdout.n > domain.holdout:
            raise wrong(
                f"evaluation[{index}].holdout.n",
                f"asks for {hook.holdout.n} held-out problems; domains.{name}.holdout is {domain.holdout}",
            )
    for effort in domain.efforts:
        if domain.new_tokens(effort) >= recipe.rollout.max_model_len:
            place = f".modes.{effort}" if effort and domain.modes[effort].max_new_tokens else ""
            raise wrong(
                f"domains.{name}{place}.max_new_tokens",
                f"leaves no room for a prompt: rollout.max_model_len is {recipe.rollout.max_model_len}",
            )
