"""The commands that make something: what they take, and which view they hand it to.

What stands at the top here, and in all that `main` imports, is what parsing a command line needs: typer,
`gdagrow.errors` and `gdagrow.choices`. A command imports what carries it out when it runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import gdagrow
from gdagrow.choices import DEFAULT_MAX_SHARD_SIZE, Format
from gdagrow_cli.app import app
from gdagrow_cli.growth_flags import takes_growth
from gdagrow_cli.options import (
    AsJson,
    Budget,
    Checkpoint,
    Compare,
    MaxShardSize,
    ModelConfig,
    MomentsOption,
    Quiet,
    ScheduleOption,
)  # fmt: skip

if TYPE_CHECKING:
    from gdagrow.recipe import Recipe


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gdagrow {gdagrow.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    # Stands here for --help; `main` takes it out, wherever it was typed, before the command line is parsed.
    debug: Annotated[bool, typer.Option("--debug", metavar="", help="Show the traceback of an error.")] = False,
) -> None:
    pass


@app.command()
def inspect(checkpoint: Checkpoint, as_json: AsJson = False) -> None:
    """Show what a checkpoint is: its heads, parameters and bytes, and what it was grown from."""
    from gdagrow_cli.inspect_view import show_checkpoint

    show_checkpoint(checkpoint, as_json=as_json)


@app.command()
@takes_growth
def plan(
    checkpoint: Checkpoint,
    recipe: "Recipe | None",
    budget: Budget = None,
    compare: Compare = False,
    moments: MomentsOption = None,
    schedule: ScheduleOption = None,
    config: ModelConfig = None,
    as_json: AsJson = False,
) -> None:
    """Show what a growth would make of a checkpoint; no weight is read but for --select norm, nothing is written."""
    if budget is not None or compare:
        from gdagrow_cli.budget_view import require_alone, show_comparison

        others = {"a growth": recipe, "--moments": moments, "--schedule": schedule}
        require_alone(budget, compare, [name for name, given in others.items() if given is not None])
        show_comparison(checkpoint, budget or "", config, as_json=as_json)
        return
    from gdagrow.growing import prepare_growth
    from gdagrow.recipe import make_recipe
    from gdagrow_cli.plan_view import show_plan

    # No flag at all asks for no growth, which a recipe of nothing says.
    growing = prepare_growth(checkpoint, recipe or make_recipe({}), moments=moments, schedule=schedule, config=config)
    show_plan(growing, as_json=as_json)


@app.command()
@takes_growth
def expand(
    checkpoint: Checkpoint,
    recipe: "Recipe | None",
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="The directory to make; by default CKPT-WHAT-WAS-DONE beside CKPT."),
    ] = None,
    max_shard_size: MaxShardSize = DEFAULT_MAX_SHARD_SIZE,
    moments: MomentsOption = None,
    schedule: ScheduleOption = None,
    config: ModelConfig = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            metavar="",
            show_default=False,
            help="Go on with what an interrupted run left: keep its finished files. If interrupted, leave them too.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Do as plan does.", show_default=False)
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Grow a checkpoint into a new directory, which appears whole or not at all."""
    from gdagrow.growing import prepare_growth
    from gdagrow.layout import parse_size
    from gdagrow.recipe import make_recipe
    from gdagrow_cli.plan_view import show_plan

    growing = prepare_growth(
        checkpoint, recipe or make_recipe({}), moments=moments, schedule=schedule,
        max_shard_bytes=parse_size(max_shard_size), config=config,
    )  # fmt: skip
    if dry_run:
        show_plan(growing, as_json=as_json, quiet=quiet)
        return
    from gdagrow_cli.expand_view import run_expand

    run_expand(growing, out, resume=resume, as_json=as_json, quiet=quiet)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A directory of safetensors weights, or a distributed checkpoint.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    to: Annotated[Format, typer.Option(help="The format to write.")],
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The config.json of a distributed checkpoint that has none, or the directory of the model that it "
            "was trained from.",
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What stands before a weight's name in its key in dcp: model. if left out; '' for nothing.",
        ),
    ] = None,
    max_shard_size: MaxShardSize = DEFAULT_MAX_SHARD_SIZE,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Copy a model's weights between safetensors and a torch distributed checkpoint (DCP), bit for bit."""
    from gdagrow.layout import parse_size
    from gdagrow_cli.convert_view import run_convert

    run_convert(source, out, to, config, prefix, parse_size(max_shard_size), as_json=as_json, quiet=quiet)


@app.command()
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    with_code: Annotated[
        bool,
        typer.Option(
            "--with-code",
            metavar="",
            show_default=False,
            help="Add the model's code, for trust_remote_code=True where gdagrow is not installed.",
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Copy a checkpoint into a directory to publish, without training state; it appears whole or not at all."""
    from gdagrow_cli.export_view import run_export

    run_export(checkpoint, out, with_code=with_code, as_json=as_json, quiet=quiet)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file that says what to train and how.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's directory; by default the recipe's name, here.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            metavar="",
            show_default=False,
            help="Say what the run would be and take, without reading weights or making anything.",
        ),
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="For --dry-run: the number of processes, one a GPU; by default torchrun's, or 1."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            metavar="",
            show_default=False,
            help="Go on from the last whole state in DIR, or from the start if there is none.",
        ),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart", metavar="", show_default=False, help="Remove what an earlier run left in DIR, and begin anew."
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a model, or go on training one, and grow it in mid-run if the recipe says so.

    One process, or several started by torchrun or accelerate launch. Needs the package's extra `train`.
    """
    if dry_run:
        from gdagrow_cli.forecast_view import show_forecast

        show_forecast(recipe, processes, as_json=as_json)
        return
    from gdagrow_cli.train_view import run_training

    run_training(recipe, out, resume=resume, restart=restart, as_json=as_json, quiet=quiet)


@app.command()
def experiment(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML file that says which arms to train and how.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The experiment's directory; by default the recipe's name, here.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(metavar="NAME", help="One of the recipe's other scales, such as gpu.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", metavar="", show_default=False, help="The recipe's smallest scale: does it all work?"),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Runs at a time, one thread each; by default as many as there are cores."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", metavar="", show_default=False, help="Say what would be run and what it takes; make nothing."
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train the arms of an experiment with every seed, and compare them: results.json, tables and plots.

    Goes on where it was stopped: the same command line starts it and takes it up again. Needs the package's extra
    `experiment`.
    """
    from gdagrow_cli.experiment_view import experiment_at, run_experiment, show_experiment

    chosen = experiment_at(recipe, out, scale, quick=quick)
    if dry_run:
        show_experiment(chosen, as_json=as_json)
        return
    run_experiment(chosen, jobs, as_json=as_json, quiet=quiet)
