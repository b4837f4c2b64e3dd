"""Architectures: each is a table of parameters over named axes, its axis sizes from a config, and its grown config."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from gdagrow.axes import Notation, parse
from gdagrow.errors import CheckpointError
from gdagrow.heads import MAX_HEADS, Heads


@dataclass(frozen=True)
class Parameter:
    """One row of an architecture's table.

    name: The tensor's name; `{layer}` stands for the layer's index.
    notation: Its dimensions in arrow notation (see `gdagrow.axes`).
    part: What it belongs to: `embedding`, `attention`, `mlp`, `norm` or `head`.
    optional: Whether checkpoints without it exist (biases); those that have it have it in every layer.
    """

    name: str
    notation: str
    part: str
    optional: bool = False

    @property
    def parsed(self) -> Notation:
        return parse(self.notation)

    @property
    def is_layered(self) -> bool:
        return "{layer}" in self.name


@dataclass(frozen=True)
class Sizes:
    """The sizes that a config gives: the heads and every axis."""

    heads: Heads
    head_dim: int
    hidden: int
    ffn: int
    vocab: int
    num_layers: int

    @property
    def axes(self) -> Mapping[str, int]:
        """Axis name to size; `signal` is the number of signal heads in one group."""
        return {
            "group": self.heads.num_groups, "signal": self.heads.ratio, "kv": self.heads.num_kv_groups,
            "head_dim": self.head_dim, "hidden": self.hidden, "ffn": self.ffn, "vocab": self.vocab,
        }  # fmt: skip


class Trained(Protocol):
    """What gdagrow knows of a family of models that it can train: their parameters and sizes."""

    name: str

    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        """Read a config. Raises CheckpointError naming every key that is missing or makes no sense."""

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the head reads the embedding's own tensor."""

    def table(self, config: Mapping[str, Any]) -> tuple[Parameter, ...]:
        """Every parameter of a checkpoint with this config."""


class Architecture(Trained, Protocol):
    """What gdagrow knows of a family of models that it can grow, and run to see what they compute."""

    embedding: str  # the parameter that a tied head shares
    head: str  # the parameter that an untied head adds
    last_norm: str  # the norm before the head, which carries the split of a tied head's input
    subln: str | None  # the weight of the sub-norm in a layer, None if it has none
    lambdas: str  # a lambda vector in a layer, by its `name` such as `lambda_q1`
    norm_eps: str | None  # the config's key for the eps of norms over the residual stream, if they alone have it
    only_ratio: int | None  # the one ratio that the layout can hold, None if it holds any

    def averages_ffn(self, config: Mapping[str, Any]) -> bool:
        """Whether the activation averages over the FFN, so that all its units must have as many copies."""

    def grown_config(self, config: Mapping[str, Any], grown: Sizes, *, tied: bool) -> dict[str, Any]:
        """The config with only the grown keys changed."""


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Find the architecture whose table covers a config's `model_type`.

    Raises:
        CheckpointError: no table covers it; names those that exist.
    """
    from gdagrow.archs.diffllama import DiffLlama
    from gdagrow.archs.motif import Motif

    tables: dict[str, Architecture] = {"motif": Motif(), "diffllama": DiffLlama()}
    model_type = config.get("model_type")
    found = tables.get(model_type.lower()) if isinstance(model_type, str) else None
    if found is None:
        raise CheckpointError(
            f"config.json: model_type {model_type!r} has no table; gdagrow knows {', '.join(tables)} "
            "(docs/add-an-architecture.md says what a new one takes)"
        )
    return found


def trained_of(config: Mapping[str, Any]) -> Trained:
    """Find what can be trained with a config: whatever can be grown, and the baseline of standard attention.

    Raises:
        CheckpointError: no table covers it.
    """
    from gdagrow.archs.llama import Llama

    llama = Llama()
    return llama if config.get("model_type") == llama.name else architecture_of(config)


def in_model_order(table: tuple[Parameter, ...], num_layers: int) -> Iterator[tuple[Parameter, int]]:
    """Each row with its layer, in the order of the model's `named_parameters()`: the layered rows layer by layer."""
    first = next(i for i, p in enumerate(table) if p.is_layered)
    yield from ((p, 0) for p in table[:first] if not p.is_layered)
    yield from ((p, layer) for layer in range(num_layers) for p in table if p.is_layered)
    yield from ((p, 0) for p in table[first:] if not p.is_layered)


# What is made one by one before anything stored is compared with it: tensors of each layer, and heads.
_AT_MOST: Final = {"num_hidden_layers": 10_000, "num_attention_heads": MAX_HEADS}


def whole_number(config: Mapping[str, Any], key: str, problems: list[str], default: int | None = None) -> int:
    """Read a whole number of 1 or more; where it is none, say so in `problems` and go on with 1."""
    value, most = config.get(key), _AT_MOST.get(key, 2**31 - 1)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        problems.append(f"{key}: expected a whole number of 1 or more, got {value!r}")
        return 1
    if value > most:
        problems.append(f"{key}: expected at most {most}, got {value}")
        return 1
    return value
