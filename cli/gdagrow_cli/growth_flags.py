"""The growth flags of `plan` and `expand`: one table, how they are typed, and the recipe that they make."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from gdagrow.choices import DEFAULT_SNR_DB
from gdagrow.errors import RecipeError

if TYPE_CHECKING:
    from gdagrow.heads import Ratio
    from gdagrow.recipe import Recipe

_GROWTH: Final = "Growth (--signal-x 2 may be written --signal-x2, and so for all)"
_TARGET: Final = "A target instead"
_DEPTH: Final = "Depth"
_COPIES: Final = "How copies are told apart"


def _factor(flag: str, text: str, *, hidden: bool = False) -> Any:
    option = typer.Option(flag, metavar="N", help=text, rich_help_panel=_GROWTH, hidden=hidden, show_default=False)
    return Annotated[str | None, option]


def _text(flag: str, metavar: str, text: str, panel: str) -> Any:
    return Annotated[str | None, typer.Option(flag, metavar=metavar, help=text, rich_help_panel=panel)]


def _switch(flags: str, text: str, panel: str) -> Any:
    return Annotated[bool | None, typer.Option(flags, metavar="", help=text, rich_help_panel=panel, show_default=False)]


# Parameter of the command to its option.
_FLAGS: Final[Mapping[str, Any]] = {
    "signal": _factor("--signal-x", "Clone every signal head N times."),
    "noise": _factor("--noise-x", "Clone every noise head N times, and so the query groups."),
    "kv": _factor("--kv-x", "Clone every KV group N times."),
    "hidden": _factor("--hidden-x", "Widen the residual stream N times."),
    "ffn": _factor("--ffn-x", "Widen the FFN N times."),
    "uniform": _factor("--uniform-x", "All five N times: the HyperCloning baseline; stands alone."),
    "head_dim": _factor("--head-dim-x", "Cannot grow, and says why.", hidden=True),
    "signal_any": _text("--signal", "N|R:1", "Either of --signal-x N and --ratio R:1.", _GROWTH),
    "ratio": _text("--ratio", "R:1", "Clone signal heads up to R for each noise head, instead of --signal-x.", _GROWTH),
    "select": _text(
        "--select", "WHICH", "Which heads --ratio clones once more than others: first (default), norm, given:FILE.",
        _GROWTH,
    ),
    "hidden_to": _text("--hidden-to", "N", "Widen the residual stream to N, which need be no multiple.", _GROWTH),
    "ffn_to": _text("--ffn-to", "N", "Widen the FFN to N, which need be no multiple.", _GROWTH),
    "depth": _text("--depth", "+K", "Add K blocks.", _DEPTH),
    "layers": _text("--layers", "N", "Add blocks until there are N layers.", _DEPTH),
    "insert": _text(
        "--insert", "WHERE", "Where they go: even (default), top, bottom, or after:3,7,11 (layers of CKPT).", _DEPTH
    ),
    "like": _text(
        "--like", "TARGET", "Grow to the sizes of another model: a directory, a config.json, or motif-2-12.7b.", _TARGET
    ),
    "rope_theta": _text("--rope-theta", "X", "Change the base of RoPE, and so the function.", _TARGET),
    "context": _text("--context", "N", "Write max_position_embeddings N; nothing else changes.", _TARGET),
    "to": _text("--to", "LAYOUT", "Convert to another layout first: motif (from diffllama), for any ratio.", _GROWTH),
    "recipe_file": _text("--recipe", "FILE", "Read the growth from a YAML file; flags override its fields.", _GROWTH),
    "untie": _switch("--untie/--keep-tied", "What becomes of tied embeddings; by default they stay tied.", _GROWTH),
    "exact_copies": _switch("--exact-copies", "Leave copies identical; they stay so for ever in training.", _COPIES),
    "snr_db": _text("--snr-db", "DB", f"How far noise lies below weights; {DEFAULT_SNR_DB:g} if left out.", _COPIES),
    "seed": _text("--seed", "N", "Seed of that noise, and of what is drawn anew; 0 if left out.", _COPIES),
}  # fmt: skip

# Fields of a recipe whose flag gives them as they are.
_FIELDS: Final = {
    **{axis: f"--{axis}-x" for axis in ("signal", "noise", "kv", "hidden", "ffn", "uniform")},
    "head_dim": "--head-dim-x", "to": "--to", "exact_copies": "--exact-copies", "snr_db": "--snr-db", "seed": "--seed",
    "select": "--select", "hidden_to": "--hidden-to", "ffn_to": "--ffn-to", "depth": "--depth", "layers": "--layers",
    "insert": "--insert", "like": "--like", "rope_theta": "--rope-theta",
}  # fmt: skip

# How the fields of a recipe are typed that a comparison of growths proposes.
_TYPED: Final = {
    "to": "--to={}", **{axis: f"--{axis}-x{{}}" for axis in ("signal", "noise", "kv", "hidden", "ffn", "uniform")},
    "depth": "--depth=+{}",
}  # fmt: skip

_GLUED: Final = re.compile(r"(--(?:signal|noise|kv|hidden|ffn|uniform|head-dim)-x)([^=].*)", re.DOTALL)


def spread(argv: Sequence[str]) -> list[str]:
    """Rewrite `--signal-x2` to `--signal-x=2`, which an option parser knows; what follows `--` is left as it is."""
    end = argv.index("--") if "--" in argv else len(argv)
    return [_GLUED.sub(r"\1=\2", word) for word in argv[:end]] + list(argv[end:])


def flags_of(recipe: "Recipe") -> list[str]:
    """The flags that make a recipe of whole factors and a depth."""
    asked = recipe.as_dict()
    return [form.format(asked.pop(field)) for field, form in _TYPED.items() if field in asked]


def takes_growth(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the growth flags in place of its parameter `recipe`.

    It gets the `Recipe` that they make, or None if none of them was typed.
    """
    own = list(inspect.signature(command).parameters.values())
    at = next(i for i, parameter in enumerate(own) if parameter.name == "recipe")
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _FLAGS.items()
    ]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own[:at], *flags, *own[at + 1 :])]

    def taking(**values: Any) -> None:
        typed = {name: values.pop(name) for name in _FLAGS}
        is_absent = all(value is None for value in typed.values())
        command(recipe=None if is_absent else recipe_from(typed), **values)

    taking.__name__, taking.__doc__ = command.__name__, command.__doc__
    taking.__annotations__ = {p.name: p.annotation for p in parameters}
    taking.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return taking


def recipe_from(typed: Mapping[str, Any]) -> "Recipe":
    """Make a recipe of what was typed, over the fields of a recipe file if there is one.

    Raises:
        RecipeError: it is no growth, or the file is no recipe.
    """
    from gdagrow.recipe import make_recipe, read_recipe

    file = typed["recipe_file"]
    values = read_recipe(Path(file)) if file is not None else {}
    given = {field: flag for field, flag in _FIELDS.items() if typed[field] not in (None, False)}
    values |= {field: typed[field] for field in given}
    if (signal := _signal(typed)) is not None:
        values["signal"] = signal
    if typed["context"] is not None:
        values["max_position_embeddings"], given["max_position_embeddings"] = typed["context"], "--context"
    if typed["untie"] is not None:
        values["embeddings"] = "untie" if typed["untie"] else "keep"
    return make_recipe(values, "growth" if file is None else f"recipe {file}", given)


def _signal(typed: Mapping[str, Any]) -> "str | Ratio | None":
    """What `--signal` or `--ratio` says, at most one of which may stand beside `--signal-x`."""
    from gdagrow.recipe import parse_ratio

    flags: dict[str, str | None] = {
        "--signal": typed["signal_any"], "--ratio": typed["ratio"], "--signal-x": typed["signal"],
    }  # fmt: skip
    given = [(flag, value) for flag, value in flags.items() if value is not None]
    if len(given) > 1:
        raise RecipeError(
            f"{given[0][0]} and {given[1][0]} both say how many signal heads there shall be; give one of them"
        )
    for flag, value in given:
        if flag == "--ratio" or (flag == "--signal" and ":" in value):
            try:
                return parse_ratio(value)
            except RecipeError as error:
                raise RecipeError(f"{flag}: {error}") from None
    return flags["--signal"]
