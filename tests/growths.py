"""Random topologies and growths for hypothesis, headers without weights, and the maps that a growth.json records."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from gdagrow.archs.motif import Motif
from gdagrow.expand import expand
from gdagrow.formats.safetensors_header import read_header
from gdagrow.header import ITEM_BYTES, Header, TensorInfo
from gdagrow.output import weights_output
from gdagrow.plan import GrowthPlan, make_plan
from gdagrow.recipe import make_recipe

# The same examples at every run, each through real files; a failure is not explained, which would take minutes.
RANDOM = settings(
    derandomize=True, deadline=None, suppress_health_check=list(HealthCheck),
    phases=[phase for phase in Phase if phase is not Phase.explain],
)  # fmt: skip

# Far from `rms_norm_eps`, so that one eps used in place of the other shows.
EPS = {"attn_rms_norm_eps": 1e-3}

STORED_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


@st.composite
def topologies(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = STORED_DTYPES) -> dict[str, Any]:
    """Arguments of `write_checkpoint`."""
    kv_groups, served, dim = draw(st.integers(1, 2)), draw(st.integers(1, 2)), 2 * draw(st.integers(1, 3))
    plain = draw(st.booleans()) and draw(st.booleans())
    groups, ratio = kv_groups * served, 1 if plain else draw(st.integers(1, 4))
    return {
        "groups": groups,
        "ratio": ratio,
        "kv_groups": kv_groups,
        "head_dim": dim,
        "hidden": 2 * groups * dim if plain else draw(st.integers(2, 10)),
        "ffn": draw(st.integers(2, 10)),
        "vocab": draw(st.integers(5, 13)),
        "layers": draw(st.integers(1, 3)),
        "activation": draw(st.sampled_from(["poly_norm", "silu"])),
        "tied": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "dtype": (dtype := draw(st.sampled_from(dtypes))),
        "lambda_dtype": draw(st.sampled_from([dtype, torch.promote_types(dtype, torch.float32)])),
        "plain": plain,
        "seed": draw(st.integers(0, 2**31)),
        "scale": draw(st.sampled_from([0.2, 0.6])),
        "extra": EPS,
    }


FACTORS = st.sampled_from([1, 1, 1, 2, 2, 3, 3, 5, 6, 7])


@st.composite
def growths(draw: st.DrawFn, topology: Mapping[str, Any], exact_copies: bool | None = None) -> dict[str, Any]:
    """A recipe that the heads of a topology allow."""
    exact = draw(st.booleans()) if exact_copies is None else exact_copies
    recipe: dict[str, Any] = {"exact_copies": exact}
    if not exact:
        recipe |= {"snr_db": draw(st.sampled_from([20.0, 40.0, 60.0])), "seed": draw(st.integers(0, 2**64 - 1))}
    if topology["tied"]:
        recipe["embeddings"] = draw(st.sampled_from([None, "keep", "untie"]))
    if draw(st.integers(0, 5)) == 0:
        return recipe | {"uniform": draw(st.integers(2, 3))}
    ratio, served = topology["ratio"], topology["groups"] // topology["kv_groups"]
    target = draw(st.booleans()) and draw(st.booleans())
    noise = draw(st.sampled_from([1, 1, 2, 3]))
    recipe |= {
        "noise": noise,
        "signal": f"{draw(st.integers(ratio, ratio + 4))}:1" if target
        else draw(FACTORS.filter(lambda signal: ratio * signal % noise == 0)),
        "kv": draw(st.sampled_from([k for k in range(1, served * noise + 1) if served * noise % k == 0])),
        "hidden": draw(FACTORS),
        "ffn": draw(FACTORS),
    }  # fmt: skip
    if all(recipe[axis] in (1, f"{ratio}:1") for axis in ("signal", "noise", "kv", "hidden", "ffn")):
        recipe["hidden"] = draw(st.integers(2, 3))
    return recipe


@st.composite
def compositions(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = STORED_DTYPES
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A topology and a growth of it: widths by factors or to sizes, a choice of heads, and depth."""
    topology = draw(topologies(dtypes))
    recipe = draw(growths(topology))
    layers = topology["layers"]
    for axis in ("hidden", "ffn"):
        free = axis == "hidden" or topology["activation"] == "silu"
        if recipe.get(axis) and free and draw(st.booleans()):
            del recipe[axis]
            recipe[f"{axis}_to"] = topology[axis] + draw(st.integers(0, 3 * topology[axis]))
    if isinstance(recipe.get("signal"), str):
        recipe["select"] = draw(st.sampled_from([None, "first", "norm"]))
    where = draw(st.sampled_from(["even", "top", "bottom", "after", None]))
    if where == "after":
        behind = draw(st.lists(st.integers(0, layers - 1), min_size=1, max_size=3))
        recipe["insert"] = f"after:{','.join(map(str, behind))}"
    elif where:
        recipe |= {"insert": where, "depth": draw(st.integers(1, 4))}
    return topology, {key: value for key, value in recipe.items() if value is not None}


@dataclass(frozen=True)
class Grown:
    """A source and what it grew into, as plain dicts of tensors read by safetensors itself."""

    plan: GrowthPlan
    source: Path
    target: Path
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def grow(source: Path, target: Path, recipe: Mapping[str, Any]) -> Grown:
    """Plan and carry out a growth through real files, one weight file on either side."""
    plan = make_plan(read_header(source), make_recipe(dict(recipe)))
    expand(plan, target, weights_output(plan, 10**10))
    return Grown(plan, source, target, load_file(source / "model.safetensors"), load_file(target / "model.safetensors"))


def recorded_maps(record: Mapping[str, Any], source: Mapping[str, Any], name: str) -> tuple[list[int], ...]:
    """New to old index along each dimension of a grown tensor, from the lineage of `growth.json` alone.

    Written by hand after the layout of the Motif checkpoints, without the arrow notation.

    Args:
        record: The content of `growth.json`.
        source: The source's config.
        name: The tensor's name.
    """
    heads = source["num_attention_heads"]
    groups = source.get("num_noise_heads", heads // 2)
    dim, ratio = source.get("head_dim", source["hidden_size"] // heads), heads // groups - 1
    lineage = record["lineage"]
    hidden, ffn = ([i for a, b in lineage[axis] for i in range(a, b)] for axis in ("hidden", "ffn"))
    signal, noise = lineage["signal_heads"], lineage["noise_heads"]
    queries: list[int] = []
    for group_heads, noise_group in zip(signal, noise, strict=True):
        queries += [group * (ratio + 1) + head for group, head in group_heads] + [noise_group * (ratio + 1) + ratio]
    outputs = [group * ratio + head for group_heads in signal for group, head in group_heads]
    whole = [name.split(".")[-2], name.split(".")[-1]]
    if whole[-1].startswith("lambda_") or whole[0] in ("subln", "act_fn"):
        sizes = {"subln": 2 * dim, "act_fn": 3 if whole[-1] == "weight" else 1}
        return (list(range(sizes.get(whole[0], dim))),)
    vocab = list(range(source["vocab_size"]))
    rows = {"q_proj": _blocks(queries, dim), "k_proj": _blocks(lineage["kv_groups"], 2 * dim),
            "v_proj": _blocks(lineage["kv_groups"], 2 * dim), "gate_proj": ffn, "up_proj": ffn,
            "embed_tokens": vocab, "lm_head": vocab}  # fmt: skip
    columns = {"o_proj": _blocks(outputs, 2 * dim), "down_proj": ffn}
    both = (rows.get(whole[0], hidden), columns.get(whole[0], hidden))
    is_matrix = whole[-1] == "weight" and "norm" not in whole[0]
    return both if is_matrix else both[:1]


def _blocks(indices: list[int], size: int) -> list[int]:
    return [index * size + i for index in indices for i in range(size)]


def reads_last_dim(name: str, *, tied: bool) -> bool:
    """Whether a tensor's last dimension is one that the layer reads, so that its copies share the weight."""
    if name == "model.norm.weight":
        return tied
    return name.endswith("proj.weight") or name == "lm_head.weight"


def header(config: Mapping[str, Any], replaced: Mapping[str, TensorInfo | None] | None = None) -> Header:
    """The header of a complete checkpoint without biases, in memory; `replaced` by name, None to leave a tensor out."""
    motif, tensors, replaced = Motif(), {}, replaced or {}
    sizes = motif.sizes(config)
    for parameter in (p for p in motif.table(config) if not p.optional):
        for layer in range(sizes.num_layers if parameter.is_layered else 1):
            name = parameter.name.format(layer=layer)
            stored = "F32" if "lambda_" in name else "BF16"
            tensors[name] = info(name, parameter.parsed.shape(sizes.axes), stored)
    tensors |= {name: tensor for name, tensor in replaced.items() if tensor}
    return Header(Path("source"), config, {n: t for n, t in tensors.items() if replaced.get(n, t)}, {})


def info(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> TensorInfo:
    return TensorInfo(name, dtype, shape, "model.safetensors", 0, prod(shape) * ITEM_BYTES[dtype])
