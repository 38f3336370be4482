"""The stages of a recipe as a tree for people: what runs, from what, on how many problems."""

from __future__ import annotations

from rich.text import Text
from rich.tree import Tree

from posttrain.recipe.domains import (
    CalculationsSource,
    DomainConfig,
    GeneratorSource,
    JsonlSource,
    JudgingSource,
    ReasoningGymSource,
)
from posttrain.recipe.evaluation import EvaluationHook
from posttrain.recipe.schema import WARM_START, Recipe
from posttrain.recipe.stages import GateConfig, GrpoStage, SftStage
from posttrain.recipe.student import TeacherConfig


def stage_tree(recipe: Recipe) -> Tree:
    """base, below it every domain with its stages and gate, and the student with its teachers."""
    tree = Tree(Text(f"{recipe.name}: {_model(recipe)}, seed {recipe.seed}"))
    base = tree.add(Text(f"base: {_steps(recipe.stages.base) if recipe.stages.base else 'the initial weights'}"))
    for name in recipe.experts:
        domain, parent = recipe.domains[name], base
        for learned in recipe.learned_by(name):
            parent = parent.add(Text(f"{learned}: {_problems(recipe.domains[learned])}"))
        for stage in recipe.expert_stages(name):
            parent = parent.add(Text(f"expert/{name}/{stage.kind}: {_steps(stage)}"))
        parent.add(_gate(recipe.stages.experts.gate, domain))
    student = recipe.stages.student
    if student is not None:
        if student.warm_start is not None:
            base.add(Text(f"{WARM_START}: {_steps(student.warm_start)} that the experts answered"))
        steps = f"{student.steps:,} steps of {student.batch_size:,} samples of its own"
        node = base.add(Text(f"student: {student.divergence}, {steps}"))
        for name in recipe.domains:
            for teacher in recipe.teachers_of(name):
                who = f"{_teacher(recipe, teacher, name)}{_turn(teacher)}"
                node.add(Text(f"teacher: {who}{_weights(recipe, name)}"))
    for hook in recipe.evaluation:
        models = "every model" if len(hook.after) == 3 else ", ".join(hook.after)
        tree.add(Text(f"evaluation of {models}: {_evaluation(hook)}"))
    return tree


def _evaluation(hook: EvaluationHook) -> str:
    if hook.holdout is not None:
        answers = f"{hook.holdout.samples} answer{'s' if hook.holdout.samples > 1 else ''} each"
        domains = "of each domain (experts: their own)" if hook.holdout.own_domain else "of each domain"
        return f"{hook.holdout.n:,} held-out problems {domains}, {answers}"
    if hook.judge is not None:
        return f"{hook.judge.n:,} verdicts of each judge domain"
    return f"lm-eval's {', '.join(hook.lm_eval.tasks)}" if hook.lm_eval is not None else str(hook.function)


def _gate(gate: GateConfig, domain: DomainConfig) -> Text:
    otherwise = {"stop": "the run stops", "warn": "there is a warning", "drop": "the domain is dropped"}[gate.action]
    gain = (
        f"{gate.metric} must gain {100 * gate.min_gain:g} points over base on {domain.selection:,} selection problems"
    )
    return Text(f"gate: {gain}, or {otherwise}")


def _model(recipe: Recipe) -> str:
    model = recipe.model
    if model.checkpoint is not None:
        return f"{model.family} from {model.checkpoint}"
    shape = model.config if isinstance(model.config, str) else str((model.config or {}).get("model_type", "own config"))
    return f"{model.family} ({shape}) from random weights"


def _problems(domain: DomainConfig) -> str:
    source = domain.source
    if isinstance(source, ReasoningGymSource):
        origin = f"reasoning-gym {source.reasoning_gym}"
    elif isinstance(source, CalculationsSource):
        origin = "calculations"
    elif isinstance(source, GeneratorSource):
        origin = source.generator
    elif isinstance(source, JudgingSource):
        origin = f"judging of {source.judging.domain or source.judging.labels}, {source.judging.form}"
    else:
        origin = source.jsonl if isinstance(source, JsonlSource) else source.dataset
    rewards = ", ".join(spec if isinstance(spec, str) else next(iter(spec)) for spec in domain.reward)
    counts = f"{domain.train:,} problems to train, {domain.selection:,} to select, {domain.holdout:,} held out"
    efforts = f"; in {', '.join(domain.modes)}" if domain.modes else ""
    return f"{origin}; {counts}; reward {rewards}{efforts}{_environment(domain)}"


def _environment(domain: DomainConfig) -> str:
    config = domain.environment
    if config is None:
        return ""
    turns = f"up to {config.turns} turns with"
    return f"; {turns} {', '.join(config.tools)}" if config.tools else f"; {turns} {config.factory}"


def _steps(stage: SftStage | GrpoStage) -> str:
    if isinstance(stage, SftStage):
        origin = f" from {stage.conversations.jsonl}" if stage.conversations else ""
        return f"{stage.steps:,} steps of {stage.batch_size:,} examples{origin}"
    return f"{stage.steps:,} steps of {stage.prompts_per_step:,} prompts with {stage.group_size:,} answers each"


def _teacher(recipe: Recipe, teacher: TeacherConfig, domain: str) -> str:
    if teacher.expert is None:
        return f"{teacher.checkpoint} for {domain}"
    name = f"expert/{teacher.expert}/{recipe.expert_stages(teacher.expert)[-1].kind}"
    return name if teacher.expert == domain else f"{name} for {domain}"


def _turn(teacher: TeacherConfig) -> str:
    """The steps in which it teaches, where these are not all."""
    if teacher.last_step is not None:
        return f", steps {teacher.first_step} to {teacher.last_step}"
    return f", from step {teacher.first_step}" if teacher.first_step > 1 else ""


def _weights(recipe: Recipe, domain: str) -> str:
    student = recipe.stages.student
    assert student is not None  # called for recipes with a student
    weight, share = student.weights.get(domain), student.shares.get(domain)
    parts = [f"weight {weight:g}"] if weight is not None else []
    parts += [f"share {share:g}"] if share is not None else []
    return f" ({', '.join(parts)})" if parts else ""
