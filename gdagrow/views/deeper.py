"""A checkpoint seen with more layers: each new block a copy of its neighbour that adds nothing to the stream yet.

What a new block writes to the residual stream is zero (LLaMA-Pro, arXiv:2401.02415), so the function is the source's. A
layer whose index changes has another lambda_init, which its sub-norm and its lambda take up (`gdagrow.lambda_init`).
These repairs are float64 whatever the checkpoint's dtype is: a shorter one would round them.
"""

from collections.abc import Callable
from typing import Final

from gdagrow.archs import Architecture, Parameter, in_model_order
from gdagrow.depth import Layers
from gdagrow.errors import PlanError
from gdagrow.header import Header
from gdagrow.lambda_init import moved, moved_norm, vectors_that_move
from gdagrow.views import Derived, Made, Seen, Zeros, view

NEW_BLOCK: Final = "its block is new"
MOVED: Final = "it makes up for the change of its layer's lambda_init"


def deepened(header: Header, architecture: Architecture, layers: Layers) -> Header:
    """See a checkpoint with more layers.

    Args:
        header: A checkpoint that fits the architecture's table.
        architecture: Its own.
        layers: Which layers there shall be.

    Raises:
        PlanError: a layer would move that the architecture cannot repair.
    """
    if architecture.subln is None and layers.moved:
        first = min(layers.moved)
        raise PlanError(
            f"layer {layers.source[first]} would become layer {first}, whose lambda_init is another, and the "
            f"{architecture.name} layout has no weight in its sub-norm that could take that up; convert the checkpoint "
            "as well with --to motif (to: motif in a recipe), or put new blocks at the top (--insert top)"
        )
    derived: dict[str, Derived] = {}
    for row, layer in in_model_order(architecture.table(header.config), len(layers.source)):
        under = row.name.format(layer=layers.source[layer])
        if under in header.tensors:
            is_new = row.is_layered and layer in layers.new
            is_silent = is_new and writes_the_stream(row)
            derived[row.name.format(layer=layer)] = (
                Zeros(under, NEW_BLOCK) if is_silent else Seen(under, anew=NEW_BLOCK if is_new else None)
            )
    for layer in layers.moved:
        derived |= _moved_layer(header, architecture, layers.source[layer], layer)
    return view(header, _deeper_config(header, layers), derived)


def writes_the_stream(row: Parameter) -> bool:
    """Whether what a parameter makes is added to the residual stream."""
    return row.is_layered and row.part != "norm" and "hidden" in row.parsed.axes(read=False)


def copies_are_free(row: Parameter, layer: int, layers: Layers) -> bool:
    """Whether copies of a tensor's rows may be any: of a matrix inside a new block, which adds nothing anyway."""
    return row.is_layered and layer in layers.new and len(row.parsed.dims) == 2 and not writes_the_stream(row)


def _moved_layer(header: Header, architecture: Architecture, old: int, new: int) -> dict[str, Derived]:
    assert architecture.subln is not None
    under, factor = architecture.subln.format(layer=old), moved_norm(old, new)
    size = header.tensors[under].num_elements
    subln = Made(size, (under,), lambda gains: [gain * factor for gain in gains], under, MOVED, factor)
    head_dim = header.tensors[architecture.lambdas.format(layer=old, name="lambda_q1")].num_elements
    lambdas = moved_lambdas(architecture, new, old=old, new=new, size=head_dim, because=MOVED, under=old)
    return {architecture.subln.format(layer=new): subln, **lambdas}


def moved_lambdas(
    architecture: Architecture, layer: int, *, old: int, new: int, size: int, because: str,
    under: int | None = None,
) -> dict[str, Derived]:  # fmt: skip
    """The lambda vectors of a layer whose lambda_init is that of index `new`, and was that of index `old`.

    Args:
        architecture: It has the vectors' names.
        layer: The layer.
        size: The vectors' size.
        because: Why they are made (see `gdagrow.views.Made`).
        under: The same layer under the view, if it has another index there.
    """
    pair = vectors_that_move(old, new)
    names = tuple(architecture.lambdas.format(layer=layer if under is None else under, name=name) for name in pair)

    def making(which: int) -> Callable[..., list[float]]:
        return lambda query, key: moved(query, key, old, new)[which]

    return {
        architecture.lambdas.format(layer=layer, name=name): Made(size, names, making(which), names[which], because)
        for which, name in enumerate(pair)
    }


def _deeper_config(header: Header, layers: Layers) -> dict[str, object]:
    keys: dict[str, object] = {"num_hidden_layers": len(layers.source)}
    kinds = header.config.get("layer_types")
    # A list with an entry for each layer, which transformers 5 writes for some models.
    if isinstance(kinds, list) and len(kinds) == max(layers.source) + 1:
        keys["layer_types"] = [kinds[source] for source in layers.source]
    return {**header.config, **keys}
