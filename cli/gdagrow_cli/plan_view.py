"""`gdagrow plan`: what a growth would make of a checkpoint."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gdagrow.choices import Moments
from gdagrow.costs import growth_figures
from gdagrow.formats.companions import Companions, SkippedFile, list_companions
from gdagrow.formats.safetensors_header import INDEX_FILE
from gdagrow.growing import Growing
from gdagrow.heads import HeadGrowth
from gdagrow.plan import GrowthPlan, TensorPlan
from gdagrow.record import RECORD_FILE, lineage
from gdagrow.rows import told_by_row
from gdagrow.units import bytes_text
from gdagrow.views import why_float64
from gdagrow_cli.console import print_json, print_unbroken, printable, stdout_console
from gdagrow_cli.figures_view import HEADING, figures_table
from gdagrow_cli.head_map import draw_choices, draw_growth, legend
from gdagrow_cli.layer_map import draw_layers

_WRITTEN_ANEW: Final = ("config.json", RECORD_FILE, INDEX_FILE)


def show_plan(growing: Growing, *, as_json: bool, quiet: bool = False) -> None:
    """Print what a growth would do.

    Raises:
        CheckpointError: the source cannot be listed.
    """
    companions = list_companions(growing.plan.header.directory, growing.output.carried)
    if as_json:
        print_json(growth_as_dict(growing, companions))
    elif not quiet:
        _print(stdout_console(), growing, companions)


def growth_as_dict(growing: Growing, companions: Companions) -> dict[str, Any]:
    """A growth without its index maps, for JSON."""
    plan, output = growing.plan, growing.output
    figures = growth_figures(plan, output.layouts)
    return {
        "directory": str(plan.header.directory),
        "architecture": plan.architecture.name,
        "converted_from": plan.converted_from,
        "recipe": plan.recipe.as_dict(),
        "factors": plan.factors,
        **figures.as_dict(),
        "shapes": {t.name: {"source": _source_shape(plan, t), "grown": t.shape} for t in plan.tensors},
        "lineage": lineage(plan),
        "float64": told_by_row((t.parameter, why_float64(plan.header, t.source.name)) for t in plan.tensors),
        "companions": {"copied": companions.copied, "left_behind": {s.path: s.reason for s in companions.skipped}},
        "learning_rate_multipliers": learning_rate_multipliers(plan),
        "training_state": dict(output.record) or None,
        "hints": growing.hints,
    }


def learning_rate_multipliers(plan: GrowthPlan) -> dict[str, float]:
    """The suggested multipliers that are not 1, by parameter."""
    rows = {tensor.parameter: tensor.learning_rate_multiplier for tensor in plan.tensors}
    return {parameter: multiplier for parameter, multiplier in rows.items() if multiplier != 1}


def growth_text(plan: GrowthPlan) -> str:
    """What is done, on one line: `signal x2, hidden x2; noise 40 dB down, seed 0`."""
    done = [f"{plan.converted_from} to {plan.architecture.name}"] if plan.converted_from else []
    done += [
        f"{axis} to {value}" if isinstance(value, str) else f"{axis} x{value}"
        for axis, value in plan.factors.items()
        if value != 1
    ]
    done += [f"{key} {before} to {after}" for key, (before, after) in plan.changed_keys.items()]
    if plan.tied_before:
        done.append("embeddings stay tied" if plan.tied_after else "embeddings untied")
    if not any(tensor.growth.splits for tensor in plan.tensors):
        return ", ".join(done)
    recipe = plan.recipe
    copies = "exact copies" if recipe.exact_copies else f"noise {recipe.snr_db:g} dB down, seed {recipe.seed}"
    return f"{', '.join(done)}; {copies}"


def print_companions(console: Console, growing: Growing, companions: Companions) -> None:
    """The files beside the weights that come along, and those that do not and why."""
    output = growing.output
    grown = {shard for header in output.sources.values() for shard in header.shards}
    own = {*grown, *output.files, *_WRITTEN_ANEW}
    left_behind = [skip for skip in companions.skipped if skip.path not in own]
    if not companions.copied and not left_behind:
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for path in companions.copied:
        table.add_row(printable(path), "copied")
    for skip in left_behind:
        table.add_row(*_told(skip))
    print_section(console, "Files beside the weights", table)


def _told(skip: SkippedFile) -> tuple[str, Text]:
    return printable(skip.path), Text.assemble(("left behind: ", "yellow"), skip.reason)


def print_state(console: Console, growing: Growing) -> None:
    """What becomes of the training state, if there is one."""
    if not growing.output.record:
        return
    optimizer, warm_up = growing.output.record["optimizer"], growing.output.record["warm_up"]
    moments = growing.output.moments
    moment_bytes = bytes_text(sum(moment.num_bytes for moment in moments))
    lines = [f"{len(moments):,} moments grown, {moment_bytes}; schedule: {optimizer['schedule']}"]
    reset: dict[str, list[str]] = {}
    for parameter, reason in optimizer["reset"].items():
        reset.setdefault(reason, []).append(parameter.removeprefix("model.layers.{layer}."))
    if optimizer["moments"] == Moments.reset:
        reset = {"asked for": ["all"]}
    lines += [f"begin at zero ({reason}): {', '.join(parameters)}" for reason, parameters in reset.items()]
    if warm_up["steps"]:
        lines.append(f"proposed warm-up: {warm_up['steps']:,} steps ({warm_up['because']})")
    print_section(console, "Training state", *lines)


def print_hints(console: Console, growing: Growing) -> None:
    """What a user may want to know before going on."""
    for hint in growing.hints:
        console.print()
        console.print(Text.assemble(("hint: ", "bold yellow"), hint))


def print_section(console: Console, heading: str, *content: RenderableType) -> None:
    """A heading after an empty line, and what belongs to it, indented."""
    console.print()
    console.print(heading, style=HEADING)
    for part in content:
        console.print(Padding(part, (0, 0, 0, 2), expand=False))


def _print(console: Console, growing: Growing, companions: Companions) -> None:
    plan = growing.plan
    figures = growth_figures(plan, growing.output.layouts)
    print_unbroken(console, str(plan.header.directory))
    console.print(f"{plan.architecture.name}: {growth_text(plan)}")
    console.print()
    console.print(figures_table({"source": figures.source, "grown": figures.grown}))
    _print_heads(console, plan.heads_of_layer)
    if plan.layers.new:
        print_section(console, "Layers of the grown model", draw_layers(plan.layers))
    print_section(console, "Shapes, and the learning rate suggested for split weights", _shapes_table(plan))
    print_state(console, growing)
    print_companions(console, growing, companions)
    memory = f"about {bytes_text(figures.peak_memory_bytes)} beside Python and torch themselves"
    print_section(console, "Memory to expand", memory)
    print_hints(console, growing)


def _print_heads(console: Console, growths: Sequence[HeadGrowth]) -> None:
    alike = len(set(growths)) == 1
    heading = f"Heads of {'every layer' if alike else 'layer 0'} of the grown model"
    print_section(console, heading, draw_growth(growths[0], console.width), legend())
    if not alike:
        print_section(console, "Signal heads cloned more than others, by layer", draw_choices(growths))


def _shapes_table(plan: GrowthPlan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("source", justify="right", no_wrap=True)
    table.add_column("grown", justify="right", no_wrap=True)
    table.add_column("learning rate", justify="right", style="cyan", no_wrap=True)
    for tensor, label in _labelled({t.parameter: t for t in plan.tensors}):
        if tensor is None:
            table.add_row(label)
            continue
        before, after = _source_shape(plan, tensor), tensor.shape
        rate = f"x{tensor.learning_rate_multiplier:.4g}" if tensor.learning_rate_multiplier != 1 else ""
        table.add_row(label, _dims(before or ()), _dims(after) if after != before else "=", rate)
    return table


def _labelled(rows: dict[str, TensorPlan]) -> Iterator[tuple[TensorPlan | None, str]]:
    """Each parameter with its label; those of a layer stand under a line of their own, without the long prefix."""
    last = ""
    for parameter, tensor in rows.items():
        prefix, layered, name = parameter.partition("{layer}.")
        if layered and prefix != last:
            yield None, f"{prefix}*"
        last = prefix
        yield tensor, f"  {name}" if layered else parameter


def _source_shape(plan: GrowthPlan, tensor: TensorPlan) -> tuple[int, ...] | None:
    """The shape of the stored tensor; None for one that has none, because a conversion makes it."""
    return None if tensor.stored is None else plan.header.stored.tensors[tensor.stored].shape


def _dims(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
