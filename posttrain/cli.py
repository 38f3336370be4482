"""The command line. Exit codes: 0 done, 1 the work failed, 2 bad input (nothing was started), 130 interrupted."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from posttrain.errors import BadInput, RunFailed
from posttrain.interrupts import raised_as_keyboard_interrupt
from posttrain.recipe import Recipe, load_recipe, resolved_yaml
from posttrain.rundir import RunDirectory, find_run

INTERRUPTED = 130


class Commands(TyperGroup):
    """Turns the errors that are for people into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command; BadInput and RunFailed end it without a traceback."""
        _make_local_modules_importable()
        try:
            return super().invoke(ctx)
        except (BadInput, RunFailed) as error:
            print(f"error: {error}", file=sys.stderr)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            ctx.exit(INTERRUPTED)


app = typer.Typer(
    cls=Commands,
    name="posttrain",
    help="Train one expert for each domain, and distil all of them into one student.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, e.g. stages.base.steps=50. Repeatable."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Replace the recipe's seed.", show_default=False)]
RunsDirectory = Annotated[Path, typer.Option("--runs-dir", help="Where run directories are.")]
RunArgument = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="A run's directory or name. Default: the newest.", show_default=False),
]
RUNS = Path("runs")


@app.command()
def run(
    recipe: RecipeFile,
    name: Annotated[
        str | None,
        typer.Option("--name", "--run", help="Name of the run. Default: the recipe's, numbered when taken."),
    ] = None,
    seed: Seed = None,
    overrides: Overrides = [],  # noqa: B006 - typer reads it, nobody writes it
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and stop.")] = False,
    runs_dir: RunsDirectory = RUNS,
) -> None:
    """Train, evaluate and report: the whole recipe."""
    resolved = load_recipe(recipe, overrides, seed)
    if dry_run:
        _show(resolved)
        return
    from posttrain import pipeline

    run_directory = RunDirectory.create(runs_dir, name, resolved)
    with run_directory:
        if name is None and run_directory.name != resolved.name:
            print(f"{runs_dir / resolved.name} exists; this run is {runs_dir / run_directory.name}", flush=True)
        try:
            code = _drive(lambda: pipeline.run(resolved, run_directory), runs_dir / run_directory.name)
        except BadInput:
            if not run_directory.has_started():
                run_directory.discard()
            raise
    raise typer.Exit(code)


@app.command()
def resume(
    run: RunArgument = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="Go on with this recipe. Default: the run's own.", show_default=False),
    ] = None,
    overrides: Overrides = [],  # noqa: B006 - typer reads it, nobody writes it
    changed: Annotated[
        Literal["refuse", "rerun", "keep"],
        typer.Option("--changed", help="What becomes of stages that another recipe, other data or other code began."),
    ] = "refuse",
    runs_dir: RunsDirectory = RUNS,
) -> None:
    """Go on with a run at its first unfinished stage."""
    path = find_run(run, runs_dir)
    with RunDirectory.open(path) as run_directory:
        other = load_recipe(recipe or path / "recipe.yaml", overrides) if recipe or overrides else None
        if run_directory.status == "finished" and other is None:
            print(f"{path} is finished; there is nothing left to do")
            return
        from posttrain import pipeline

        code = _drive(lambda: pipeline.resume(run_directory, other, changed), path)
    raise typer.Exit(code)


@app.command()
def validate(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006 - typer reads it, nobody writes it
) -> None:
    """Check a recipe and everything that it names; show it resolved, and the stages."""
    _show(load_recipe(recipe, overrides))
    print(f"{recipe} is valid")


@app.command()
def doctor(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006 - typer reads it, nobody writes it
    quick: Annotated[bool, typer.Option("--quick", help="Without the rehearsal: start nothing.")] = False,
    runs_dir: RunsDirectory = RUNS,
) -> None:
    """Try everything that a run of the recipe relies on, three steps of every stage included."""
    resolved = load_recipe(recipe, overrides)
    from posttrain.doctor import examine

    failed, bad_input = 0, False
    with raised_as_keyboard_interrupt("Stopping what was started"):
        for verdict in examine(resolved, runs_dir, quick):
            print(verdict.line(), flush=True)
            failed += verdict.status == "failed"
            bad_input |= verdict.bad_input
    print(f"{recipe}: {f'{failed} checks failed' if failed else 'ready to run'}")
    if failed:
        raise typer.Exit(BadInput.exit_code if bad_input else RunFailed.exit_code)


@app.command()
def status(run: RunArgument = None, runs_dir: RunsDirectory = RUNS) -> None:
    """Show how far a run is."""
    from posttrain.observe.status import render_status

    render_status(find_run(run, runs_dir))


@app.command()
def watch(run: RunArgument = None, runs_dir: RunsDirectory = RUNS) -> None:
    """Look on while a run goes on: a table on a terminal, lines in a pipe. Ctrl-C ends the looking, not the run."""
    from posttrain.observe.watch import watch as look_on

    path = find_run(run, runs_dir)
    if not look_on(path):
        print(f"nobody is running {path}; continue it with: posttrain resume {path}")


@app.command("eval")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint directory.", show_default=False)],
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="Recipe of the domains. Default: that of the run which holds the checkpoint."),
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="Held-out problems of each domain. Default: the recipe's.")
    ] = None,
) -> None:
    """Measure a checkpoint's accuracy on the held-out problems."""
    if not (checkpoint / "config.json").is_file():
        raise BadInput(f"{checkpoint}: not a checkpoint directory: it has no config.json")
    if recipe is None:
        recipe = checkpoint.resolve().parent.parent / "recipe.yaml"
        if not recipe.is_file():
            raise BadInput(f"{checkpoint} is in no run directory; name the recipe of its domains with --recipe")
    resolved = load_recipe(recipe)
    for domain, config in resolved.domains.items():
        if n is not None and n > config.holdout:
            raise BadInput(f"--n {n}: {recipe} holds out {config.holdout} problems (domains.{domain}.holdout)")
    from posttrain import pipeline

    with raised_as_keyboard_interrupt("Stopping what was started"):
        _print_accuracies(pipeline.evaluate_checkpoint(resolved, checkpoint, n))


@app.command()
def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Directories or names. Default: the newest.", show_default=False),
    ] = None,
    runs_dir: RunsDirectory = RUNS,
) -> None:
    """Write report.json and report.html of a run again; of two runs or more: compare them with the first."""
    if runs is not None and len(runs) > 1:
        from posttrain.observe.compare import comparison_table, write_comparison

        comparison, page = write_comparison([find_run(run, runs_dir) for run in runs])
        _print_rich(comparison_table(comparison))
        print(page)
        return
    from posttrain.observe.report import write_report

    page = write_report(find_run(runs[0] if runs else None, runs_dir))
    print(f"{page.with_suffix('.json')}\n{page}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint directory of the family deepseek_v4.")],
    out: Annotated[Path, typer.Argument(help="The directory to write.")],
    kind: Annotated[
        Literal["bf16", "fp8_fp4"],
        typer.Option("--format", help="fp8_fp4: as released, FP8 linears and MXFP4 experts."),
    ] = "bf16",
) -> None:
    """Write a checkpoint in the released layout, with a model card, for transformers, vLLM and others.

    A checkpoint in a run's directory brings the run's recipe and results into its card.
    """
    from posttrain.files import atomic_write
    from posttrain.models.deepseek_v4.checkpoint import CheckpointError
    from posttrain.models.deepseek_v4.export import export_checkpoint
    from posttrain.observe.model_card import model_card

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} exists; name a directory that does not, or an empty one")
    try:
        notes = export_checkpoint(checkpoint, out, kind)
        atomic_write(out / "README.md", model_card(checkpoint, kind, notes))
    except CheckpointError as error:
        raise BadInput(str(error)) from error
    for note in notes:
        print(f"note: {note}")
    print(out)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint directory.", show_default=False)],
    host: Annotated[str, typer.Option(help="Where to listen; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    mode: Annotated[
        Literal["chat", "high", "max"], typer.Option(help="V4's reasoning effort for requests that name none.")
    ] = "chat",
) -> None:
    """Serve a checkpoint as an OpenAI-compatible endpoint, with V4's chat format, reasoning and tool calls.

    Further options go to vLLM's server: --max-model-len 4096, --api-key KEY, ...
    """
    from rollouts.serving import serve as serve_checkpoint

    print(
        f"Serving {checkpoint.resolve().name} at http://{host}:{port}/v1 once it is loaded (Ctrl-C ends it)", flush=True
    )
    if code := serve_checkpoint(checkpoint, host, port, mode, context.args):
        raise RunFailed(f"vLLM's server ended with exit code {code}, see above")


def main() -> None:
    """The console script."""
    app()


def _drive(work: Callable[[], int], path: Path) -> int:
    """Do the work of a run; its exit code. The pipeline cleans up after Ctrl-C and after SIGTERM."""
    resume_with = f"Continue with: posttrain resume {path}"
    try:
        with raised_as_keyboard_interrupt("Stopping what this run started"):
            return work()
    except KeyboardInterrupt:
        print(f"\nInterrupted. {resume_with}", file=sys.stderr)
        return INTERRUPTED
    except RunFailed as error:
        raise RunFailed(f"{error}\n{resume_with}") from error
    except BadInput:
        raise
    except Exception:
        traceback.print_exc()
        raise RunFailed(f"the run ended unexpectedly, see above\n{resume_with}") from None


def _make_local_modules_importable() -> None:
    """Find rewards of the user's own (`package.module:function`) in the working directory, in actors as well."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if here not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([path for path in (*known, here) if path])


def _show(recipe: Recipe) -> None:
    """Print the resolved recipe and its stages."""
    from posttrain.recipe.graph import stage_tree

    print(resolved_yaml(recipe))
    _print_rich(stage_tree(recipe))


def _print_rich(content: Any) -> None:
    """On a pipe without colours and in whole lines."""
    from rich.console import Console

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)
    console.print(content)


def _print_accuracies(results: dict[str, dict[str, Any]]) -> None:
    """One line for each domain: pass@1, its 95 % interval, the number of problems."""
    for domain, cell in results.items():
        low, high = cell["ci95"]
        print(f"{domain}: pass@1 {cell['pass@1']:.1%} (95 % interval {low:.1%} to {high:.1%}, {cell['n']} problems)")
        for mode, part in cell.get("modes", {}).items():
            low, high = part["ci95"]
            print(
                f"{domain}, mode {mode}: pass@1 {part['pass@1']:.1%} (95 % interval {low:.1%} to {high:.1%}), "
                f"{part['mean_length']:.1f} tokens"
            )
