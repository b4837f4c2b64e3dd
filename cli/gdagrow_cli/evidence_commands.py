"""The commands that look at what there is: what they take, and which view they hand it to."""

from pathlib import Path
from typing import Annotated

import typer

from gdagrow_cli.app import app
from gdagrow_cli.evidence import require_one_evidence
from gdagrow_cli.options import (
    AsJson,
    Checkpoint,
    Device,
    Dtype,
    Seed,
    TextFile,
)


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
