"""A DiffLlama checkpoint seen in Motif's layout: a view of its header, from which any growth goes on.

Both tables have rows over the same named axes, so most of the conversion is an index map: every dimension is put in
the order of Motif's row. Two things are made: the weight of the sub-norm, which DiffLlama's has not, and `lambda_q1`
with `lambda_k1`, since DiffLlama's layer `i` has the lambda_init of Motif's layer `i + 1` (`gdagrow.lambda_init`).
These are constants that a short dtype would round, and are float64 whatever the checkpoint's dtype is.
"""

from collections.abc import Mapping
from functools import cache
from math import inf
from typing import Any, Final

from gdagrow.archs import Parameter, Sizes, in_model_order
from gdagrow.archs.diffllama import DiffLlama
from gdagrow.archs.motif import Motif
from gdagrow.axes import IndexMap, parse, size_of
from gdagrow.coordinates import reordering
from gdagrow.errors import CheckpointError
from gdagrow.header import Header
from gdagrow.lambda_init import moved_norm
from gdagrow.views import Derived, Made, Seen, view
from gdagrow.views.deeper import moved_lambdas

# DiffLlama's layer `i` has the lambda_init of Motif's layer `i + INDEX_SHIFT`.
INDEX_SHIFT: Final = 1

_SOURCE, _TARGET = DiffLlama(), Motif()
# Keys that only DiffLlama's code reads, or that name that code.
_LEFT_OUT = ("architectures", "auto_map", "attention_bias", "lambda_std_dev", "rope_scaling", "rope_parameters")
MADE = "it is made in the conversion, from another value"
_DEFAULT_ROPE_THETA = 10000.0  # of DiffLlamaConfig


def as_motif(header: Header) -> Header:
    """See a checkpoint in Motif's layout.

    Args:
        header: A checkpoint that fits its own table (`gdagrow.rows.claim`).

    Returns:
        A view: `open_reader` reads its tensors from the stored ones. A Motif checkpoint is returned as it is.

    Raises:
        CheckpointError: the config asks for what Motif's layout cannot say.
    """
    if header.config["model_type"].lower() == _TARGET.name:
        return header
    config = _motif_config(header.config)
    sizes = _TARGET.sizes(config)
    stored_rows = {row.name: row for row in _SOURCE.table(header.config)}
    derived: dict[str, Derived] = {}
    for row, layer in in_model_order(_TARGET.table(config), sizes.num_layers):
        name = row.name.format(layer=layer)
        if row.name == _TARGET.subln:
            derived[name] = _constant(2 * sizes.head_dim, moved_norm(layer + INDEX_SHIFT, layer))
        elif name in header.tensors:
            derived[name] = Seen(name, _order_of_rows(stored_rows[row.name], row, sizes))
    for layer in range(sizes.num_layers):
        derived |= moved_lambdas(_TARGET, layer, old=layer + INDEX_SHIFT, new=layer, size=sizes.head_dim, because=MADE)
    return view(header, config, derived)


def _constant(size: int, value: float) -> Made:
    return Made(size, (), lambda: [value] * size, None, MADE)


def _order_of_rows(stored: Parameter, wanted: Parameter, sizes: Sizes) -> IndexMap | None:
    """The map from a row's tensor to the stored one, if that has its rows in another order."""
    first, *others = _reorderings(stored.notation, wanted.notation, sizes)
    assert all(other.is_identity for other in others), f"columns of {stored.name} are stored in another order"
    return None if first.is_identity else first


@cache
def _reorderings(stored: str, wanted: str, sizes: Sizes) -> tuple[IndexMap, ...]:
    pairs = zip(parse(stored).dims, parse(wanted).dims, strict=True)
    return tuple(
        IndexMap.identity(size_of(new, sizes.axes)) if old == new else reordering(old, new, sizes.axes)
        for old, new in pairs
    )


def _motif_config(config: Mapping[str, Any]) -> dict[str, Any]:
    sizes = _SOURCE.sizes(config)
    kept = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    return {
        **kept,
        "model_type": _TARGET.name,
        "num_key_value_heads": 2 * sizes.heads.num_kv_groups,
        "num_noise_heads": sizes.heads.num_groups,
        "head_dim": sizes.head_dim,
        "attn_rms_norm_eps": config["rms_norm_eps"],
        "rope_theta": _rope_theta(config),
        "tie_word_embeddings": _SOURCE.is_tied(config),
        "use_bias": config.get("attention_bias", False),
    }


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of RoPE, where `transformers` 5 or one before it writes it."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    known = isinstance(scaling, Mapping) and scaling.keys() <= {"rope_theta", "rope_type", "type"}
    if not known or any(scaling.get(key) not in (None, "default") for key in ("rope_type", "type")):
        raise CheckpointError(
            f"config.json: RoPE is {scaling!r}, expected rope_type default with a rope_theta, which is all that "
            "Motif's layout has; such a checkpoint can be grown as it is, but neither converted nor run"
        )
    theta = scaling.get("rope_theta", config.get("rope_theta", _DEFAULT_ROPE_THETA))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < inf:
        raise CheckpointError(f"config.json: rope_theta: expected a positive number, got {theta!r}; correct the config")
    return float(theta)
