"""The commands of `gdagrow`: what they take, and which view they hand it to."""

from pathlib import Path
from typing import Annotated

import typer

import gdagrow
from gdagrow.formats.kind import Format
from gdagrow.growing import prepare_growth
from gdagrow.layout import DEFAULT_MAX_SHARD_SIZE, parse_size
from gdagrow.recipe import Recipe
from gdagrow_cli.evidence import require_one_evidence
from gdagrow_cli.growth_flags import takes_growth
from gdagrow_cli.options import (
    AsJson,
    Checkpoint,
    Device,
    Dtype,
    ModelConfig,
    MomentsOption,
    ScheduleOption,
    Seed,
    TextFile,
)

app = typer.Typer(
    help="Grow (hyperclone) checkpoints of grouped differential attention models exactly, as a stream.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    recipe: Recipe,
    moments: MomentsOption = None,
    schedule: ScheduleOption = None,
    config: ModelConfig = None,
    as_json: AsJson = False,
) -> None:
    """Show what a growth would make of a checkpoint; nothing is read but headers, nothing is written."""
    from gdagrow_cli.plan_view import show_plan

    growing = prepare_growth(checkpoint, recipe, moments=moments, schedule=schedule, config=config)
    show_plan(growing, as_json=as_json)


@app.command()
@takes_growth
def expand(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="The directory to make; by default CKPT-WHAT-WAS-DONE beside CKPT."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="The largest weight file, such as 5GB or 512MiB.")
    ] = DEFAULT_MAX_SHARD_SIZE,
    moments: MomentsOption = None,
    schedule: ScheduleOption = None,
    config: ModelConfig = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Do as plan does.", show_default=False)
    ] = False,
    as_json: AsJson = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", metavar="", help="Print nothing but errors.", show_default=False)
    ] = False,
) -> None:
    """Grow a checkpoint into a new directory, which appears whole or not at all."""
    from gdagrow_cli.plan_view import show_plan

    growing = prepare_growth(
        checkpoint, recipe, moments=moments, schedule=schedule, max_shard_bytes=parse_size(max_shard_size),
        config=config,
    )  # fmt: skip
    if dry_run:
        show_plan(growing, as_json=as_json, quiet=quiet)
        return
    from gdagrow_cli.expand_view import run_expand

    run_expand(growing, out, as_json=as_json, quiet=quiet)


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
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="The largest weight file, such as 5GB or 512MiB.")
    ] = DEFAULT_MAX_SHARD_SIZE,
    as_json: AsJson = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", metavar="", help="Print nothing but errors.", show_default=False)
    ] = False,
) -> None:
    """Copy a model's weights between safetensors and a torch distributed checkpoint (DCP), bit for bit."""
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
    quiet: Annotated[
        bool, typer.Option("--quiet", metavar="", help="Print nothing but errors.", show_default=False)
    ] = False,
) -> None:
    """Copy a checkpoint into a directory to publish, without training state; it appears whole or not at all."""
    from gdagrow_cli.export_view import run_export

    run_export(checkpoint, out, with_code=with_code, as_json=as_json, quiet=quiet)


@app.command()
def diff(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint that was grown.")],
    grown: Annotated[Path, typer.Argument(metavar="GROWN", help="What it was grown into.")],
    logits: Annotated[
        bool,
        typer.Option(
            "--logits",
            metavar="",
            show_default=False,
            help="Run both models and compare what they compute; the default.",
        ),
    ] = False,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights",
            metavar="",
            show_default=False,
            help="Fold every grown tensor back onto the source instead, bit for bit; no model is run.",
        ),
    ] = False,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients",
            metavar="",
            show_default=False,
            help="Run both backward instead: are the gradients the source's, and whose moments can be carried?",
        ),
    ] = False,
    seqs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of sequences: 4, for gradients 2 if left out.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens in each: 128, for gradients 32 if left out.")
    ] = None,
    seed: Seed = None,
    text: TextFile = None,
    decode: Annotated[
        int, typer.Option(min=0, metavar="N", help="Tokens for both to write, greedily and through their caches.")
    ] = 4,
    dtype: Annotated[Dtype, typer.Option(help="Dtype to compute in.")] = Dtype.float64,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints: what they compute on the same tokens, their weights, or their gradients.

    Exit code: 0 the same function within rounding, 1 different, 2 could not compare.
    """
    require_one_evidence(context, logits=logits, weights=weights, gradients=gradients)
    if weights:
        from gdagrow_cli.certificate_view import show_certificate

        raise typer.Exit(0 if show_certificate(source, grown, as_json=as_json) else 1)
    from gdagrow_cli.diff_view import show_diff
    from gdagrow_cli.running import tokens_for

    seqs, length = seqs or (2 if gradients else 4), length or (32 if gradients else 128)
    tokens = tokens_for(source, text=text, seqs=seqs, length=length, seed=seed)
    if gradients:
        from gdagrow_cli.gradients_view import show_gradients

        same = show_gradients(source, grown, tokens, dtype=dtype.value, device=device, as_json=as_json)
    else:
        same = show_diff(
            source, grown, tokens, dtype=dtype.value, device=device, num_decoded=decode, is_text=text is not None,
            as_json=as_json,
        )  # fmt: skip
    raise typer.Exit(0 if same else 1)


@app.command()
def stats(
    checkpoint: Checkpoint,
    text: TextFile = None,
    seqs: Annotated[int, typer.Option(min=1, metavar="N", help="Number of sequences.")] = 4,
    length: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens in each.")] = 128,
    seed: Seed = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype to compute in.")] = Dtype.float32,
    device: Device = "cpu",
    lineage: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="The growth.json, or a directory with it, if CKPT has lost its own."),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Show every head of this layer, the first being 0.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint's attention maps, layer by layer, and how far the copies of a grown one have parted."""
    from gdagrow_cli.running import tokens_for
    from gdagrow_cli.stats_view import show_stats

    tokens = tokens_for(checkpoint, text=text, seqs=seqs, length=length, seed=seed)
    show_stats(
        checkpoint, tokens, dtype=dtype.value, device=device, lineage=lineage, layer=layer, is_text=text is not None,
        as_json=as_json,
    )  # fmt: skip


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
    quiet: Annotated[
        bool, typer.Option("--quiet", metavar="", help="Print nothing but errors.", show_default=False)
    ] = False,
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
def report(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint that was grown.")],
    grown: Annotated[
        list[Path] | None, typer.Argument(metavar="GROWN", help="What it was grown into, if anything.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The HTML file to write.")] = None,
    force: Annotated[
        bool, typer.Option("--force", metavar="", show_default=False, help="Replace that file if it is there.")
    ] = False,
    run: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Draw the training curves of DIR (trainer_state.json or metrics.jsonl); give it once for each run.",
        ),
    ] = None,
    seqs: Annotated[int, typer.Option(min=1, metavar="N", help="Number of sequences to run the models on.")] = 4,
    length: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens in each.")] = 128,
    seed: Seed = None,
    text: TextFile = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype to compute in.")] = Dtype.float64,
    device: Device = "cpu",
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            metavar="",
            show_default=False,
            help="Print the page's data as one JSON object; without --out alone.",
        ),
    ] = False,
) -> None:
    """Write one HTML page about a checkpoint and what it was grown into: heads, evidence, attention, copies, training.

    Exit code: 0, whatever the page says of the models. Drawing needs the package's extra `report`.
    """
    from gdagrow_cli.report_view import require_target, run_report
    from gdagrow_cli.running import tokens_for

    require_target(out, force=force, as_json=as_json)
    tokens = tokens_for(source, text=text, seqs=seqs, length=length, seed=seed)
    origin = f"the text {text}" if text else f"random tokens, seed {seed or 0}"
    run_report(
        source, grown or [], tokens, out, origin=origin, runs=run or [], dtype=dtype.value, device=device, force=force,
        as_json=as_json,
    )  # fmt: skip
