"""A DiffLlama checkpoint seen in Motif's layout: a view of its header, from which any growth goes on.

Both tables have rows over the same named axes, so most of the conversion is an index map: every dimension is put in
the order of Motif's row. Two things are made: the weight of the sub-norm, which DiffLlama's has not, and `lambda_q1`
with `lambda_k1`, since DiffLlama's layer `i` has the lambda_init of Motif's layer `i + 1` (`gdagrow.lambda_init`).
These are constants that a short dtype would round, and are float64 whatever the checkpoint's dtype is.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from math import inf, prod
from typing import Any, Final

from gdagrow.archs import Parameter, Sizes
from gdagrow.archs.diffllama import DiffLlama
from gdagrow.archs.motif import Motif
from gdagrow.axes import IndexMap, parse, size_of
from gdagrow.coordinates import reordering
from gdagrow.errors import CheckpointError
from gdagrow.header import ITEM_BYTES, Header, TensorInfo

SUBLN: Final = "model.layers.{layer}.self_attn.subln.weight"
LAMBDAS: Final = ("model.layers.{layer}.self_attn.lambda_q1", "model.layers.{layer}.self_attn.lambda_k1")

# DiffLlama's layer `i` has the lambda_init of Motif's layer `i + INDEX_SHIFT`.
INDEX_SHIFT: Final = 1

_SOURCE, _TARGET = DiffLlama(), Motif()
# Keys that only DiffLlama's code reads, or that name that code.
_LEFT_OUT = ("architectures", "auto_map", "attention_bias", "lambda_std_dev", "rope_scaling", "rope_parameters")
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
    stored = header.tensors
    tensors = {name: stored[name] for _, name in _rows(config, sizes) if name in stored}
    for layer in range(sizes.num_layers):
        for made in (*LAMBDAS, SUBLN):
            name = made.format(layer=layer)
            shape = stored[name].shape if name in stored else (2 * sizes.head_dim,)
            # No file has these bytes; only their number means something.
            tensors[name] = TensorInfo(name, "F64", shape, "", 0, ITEM_BYTES["F64"] * prod(shape))
    return Header(header.directory, config, tensors, header.metadata, view_of=header)


def row_maps(view: Header) -> dict[str, IndexMap]:
    """For each tensor of a view whose rows are stored in another order, the map from its rows to the stored ones."""
    sizes = _TARGET.sizes(view.config)
    stored_rows = {row.name: row for row in _SOURCE.table(view.stored.config)}
    maps = {}
    for row, name in _rows(view.config, sizes):
        if row.name in stored_rows and name in view.tensors:
            first, *others = _reorderings(stored_rows[row.name].notation, row.notation, sizes)
            assert all(other.is_identity for other in others), f"columns of {row.name} are stored in another order"
            if not first.is_identity:
                maps[name] = first
    return maps


def _rows(config: Mapping[str, Any], sizes: Sizes) -> Iterator[tuple[Parameter, str]]:
    """Motif's rows with the names of the tensors they stand for."""
    for row in _TARGET.table(config):
        for layer in range(sizes.num_layers if row.is_layered else 1):
            yield row, row.name.format(layer=layer)


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
    if not known or not {scaling.get("rope_type"), scaling.get("type")} <= {None, "default"}:
        raise CheckpointError(
            f"config.json: RoPE is {scaling!r}, expected rope_type default with a rope_theta, which is all that "
            "Motif's layout has; such a checkpoint can be grown as it is, but neither converted nor run"
        )
    theta = scaling.get("rope_theta", config.get("rope_theta", _DEFAULT_ROPE_THETA))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < inf:
        raise CheckpointError(f"config.json: rope_theta: expected a positive number, got {theta!r}; correct the config")
    return float(theta)
