"""The student's supervised start: it learns from answers that the experts sampled, before or instead of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from posttrain.data.rows import labelled
from posttrain.errors import RunFailed
from posttrain.recipe.stages import OpdStage, WarmStart
from posttrain.stages.episodes import episodes_of
from posttrain.stages.grpo import draw, prompts_of
from posttrain.stages.opd import teachers_by_domain
from posttrain.stages.work import Work
from posttrain.trainers.generation import derive_seed
from posttrain.trainers.jobs import Prompt, SftJob, SnapshotPlan
from posttrain.trainers.mixing import OrderedByTeacher
from rollouts.asking import answers_to
from rollouts.environments import with_episodes
from rollouts.types import Completion, GroupRequest, Sampling

Row = dict[str, list[int]]


def run_warm_start(work: Work, name: str, config: OpdStage, start: Path, experts: Mapping[str, Path]) -> Path:
    """Sample answers from each domain's teacher and train on those that came to an end; returns the checkpoint.

    Every domain has its share of the prompts, as in the distillation. This is off-policy: the student sees the experts'
    prefixes and not its own.
    """
    warm_start = config.warm_start
    assert warm_start is not None

    def job(output: str, snapshots: SnapshotPlan | None) -> SftJob:
        rows = expert_rows(work, name, config, warm_start, answering(work, config, experts))
        return SftJob(
            stage=name, config=warm_start, checkpoint=str(start), output=output, rows=rows, snapshots=snapshots
        )

    return work.stage(name, warm_start.steps, lambda *place: work.cluster.trainers[0].sft.remote(job(*place)))


def answering(work: Work, config: OpdStage, experts: Mapping[str, Path]) -> dict[str, Path]:
    """Whose answers a domain is learned from: of its teachers that the run has trained, the one of the most weight."""
    found = {}
    for domain, teachers in teachers_by_domain(work, dict(experts)).items():
        if own := [teacher for teacher in teachers if not teacher.outside]:
            found[domain] = Path(max(own, key=lambda teacher: teacher.weight).checkpoint)
    return found


def expert_rows(
    work: Work, name: str, config: OpdStage, warm_start: WarmStart, experts: Mapping[str, Path]
) -> list[Row]:
    """`steps * batch_size` answers of the experts as rows for SFT, less those that were cut off or failed.

    Raises:
        RunFailed: none is left.
    """
    count = warm_start.steps * warm_start.batch_size
    problems = {domain: draw(work, name, domain, count) for domain in experts}
    prompts = {domain: prompts_of(work, group) for domain, group in problems.items()}
    shares = {domain: config.shares.get(domain, 1.0) for domain in experts}
    seed = derive_seed(work.recipe.seed, name)
    asked = list(OrderedByTeacher(prompts, lambda: shares, warm_start.steps, warm_start.batch_size, seed))
    everything = [problem for group in problems.values() for problem in group]
    service = work.cluster.client()
    client = with_episodes(service, episodes_of(work.recipe, str(work.run.tokenizer_path), everything))
    rows: list[Row] = []
    for domain, expert in experts.items():
        service.load_checkpoint(expert, (service.weight_version() or 0) + 1)
        longest = work.recipe.domains[domain].longest_completion
        requests = [
            request_of(name, row, prompt, longest, warm_start.temperature, derive_seed(seed, domain))
            for row, prompt in enumerate(prompt for prompt in asked if prompt.domain == domain)
        ]
        found = answers_to(client, requests, lambda request: f"prompt {request.index} of {request.domain}")
        whole = [row for request, group in zip(requests, found, strict=True) for row in rows_of(request, group)]
        if len(whole) < len(requests):
            left_out = f"{len(requests) - len(whole)} of {len(requests)} answers of {domain}'s expert"
            message = f"{left_out} did not come to an end and were left out"
            work.run.append_event({"event": "warning", "stage": name, "message": message})
        rows += whole
    if not rows:
        raise RunFailed(f"stage {name}: no answer of the experts came to an end; raise max_new_tokens of the domains")
    return rows


def request_of(name: str, row: int, prompt: Prompt, longest: int, temperature: float, seed: int) -> GroupRequest:
    """One answer to a prompt, in at most `longest` tokens where its mode has no budget of its own."""
    sampling = Sampling(prompt.max_new_tokens or longest, temperature, seed=seed)
    place, tokens = f"{name}/{prompt.domain}/{row}", list(prompt.token_ids)
    return GroupRequest(place, tokens, sampling, row, prompt.domain, problem_id=prompt.problem_id)


def rows_of(request: GroupRequest, answers: Sequence[Completion]) -> list[Row]:
    """Rows for SFT of the answers that came to an end; what an environment said is not learned."""
    return [
        labelled(request.prompt_ids, answer.token_ids, answer.loss_mask)
        for answer in answers
        if answer.finish_reason == "stop"
    ]
