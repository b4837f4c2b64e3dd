"""The figures of one model, or of a model and what it grows into side by side, as one table."""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from rich.table import Table

from gdagrow.costs import PARTS, ModelFigures
from gdagrow.units import bytes_text, count_text, flops_text, times_text

HEADING: Final = "bold"

Number = Callable[[ModelFigures], int]

_HEADS: Final[tuple[tuple[str, Number], ...]] = (
    ("signal heads", lambda m: m.sizes.heads.num_signal_heads),
    ("noise heads, one a query group", lambda m: m.sizes.heads.num_groups),
    ("KV groups", lambda m: m.sizes.heads.num_kv_groups),
    ("head_dim", lambda m: m.sizes.head_dim),
)
_WIDTHS: Final[tuple[tuple[str, Number], ...]] = (
    ("hidden", lambda m: m.sizes.hidden),
    ("ffn", lambda m: m.sizes.ffn),
    ("vocabulary", lambda m: m.sizes.vocab),
    ("layers", lambda m: m.sizes.num_layers),
)

# A row: its label, a cell for each model, and how many times more the last is than the first.
_Row = tuple[str, list[str], str]


def figures_table(models: Mapping[str, ModelFigures]) -> Table:
    """One column for each model under its title, and with two of them a column that says how much more."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.show_header = len(models) > 1
    table.add_column("", no_wrap=True)
    for title in models:
        table.add_column(title, justify="right")
    if len(models) > 1:
        table.add_column("", justify="right", style="cyan", no_wrap=True)
    for number, (heading, rows) in enumerate(_sections(list(models.values()))):
        if number:
            table.add_row()
        table.add_row(heading, style=HEADING)
        for label, cells, more in rows:
            table.add_row(f"  {label}", *cells, *([more] if len(models) > 1 else []))
    return table


def _sections(models: list[ModelFigures]) -> Iterator[tuple[str, list[_Row]]]:
    context = models[0].context_length
    ratio = _numbers(models, "ratio", lambda m: m.sizes.heads.ratio, lambda ratio: f"{ratio}:1")
    yield "Heads", [ratio, *(_numbers(models, label, number, str) for label, number in _HEADS)]
    yield "Widths", [_numbers(models, label, number, "{:,}".format) for label, number in _WIDTHS]
    parts = [part for part in PARTS if any(part in m.parameters for m in models)]
    yield "Parameters", [
        *(_numbers(models, part, _of_part(part), count_text) for part in parts),
        _numbers(models, "in all", lambda m: m.num_parameters, count_text),
    ]  # fmt: skip
    yield (
        "Weights",
        [
            _numbers(models, "bytes", lambda m: m.weight_bytes, bytes_text),
            _texts(models, "files", lambda m: str(len(m.files))),
            _texts(models, "dtypes", lambda m: ", ".join(m.dtypes)),
        ],
    )
    yield (
        "To serve, per token",
        [
            _numbers(models, "KV cache", lambda m: m.kv_cache_bytes_per_token, bytes_text),
            _numbers(models, "forward, weights", lambda m: m.matmul_flops_per_token, flops_text),
            _numbers(models, f"forward, attention over {context}", lambda m: m.attention_flops_per_token, flops_text),
            _texts(models, "tensor-parallel degrees", lambda m: " ".join(map(str, m.tensor_parallel_degrees))),
        ],
    )


def _of_part(part: str) -> Number:
    return lambda m: m.parameters.get(part, 0)


def _numbers(models: list[ModelFigures], label: str, number: Number, text: Callable[[int], str]) -> _Row:
    numbers = [number(model) for model in models]
    more = times_text(numbers[0], numbers[-1]) if numbers[0] else "new"
    return label, [text(n) for n in numbers], more


def _texts(models: list[ModelFigures], label: str, text: Callable[[ModelFigures], str]) -> _Row:
    return label, [text(model) for model in models], ""
