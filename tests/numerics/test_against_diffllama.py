"""Judged by strangers: the DiffLlama model of `transformers`, re-laid out as a 1:1 GDA model, gives the same logits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdagrow.expand import expand
from gdagrow.formats.safetensors_header import read_header
from gdagrow.models.gda import GdaConfig, GdaModel
from gdagrow.output import weights_output
from gdagrow.plan import make_plan
from gdagrow.recipe import make_recipe
from tests.diffllama import FLOOR, TOPOLOGIES, as_diffllama, as_motif, diffllama, motif_config


@pytest.mark.parametrize("sizes", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_logits_are_those_of_transformers(sizes: tuple[int, int, int, int, int, int, bool], seed: int) -> None:
    theirs = diffllama(sizes, seed)
    ours = GdaModel(GdaConfig.from_dict(motif_config(theirs.config))).double()
    ours.load_state_dict(as_motif(theirs))
    ids = torch.randint(40, (2, 13), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected, got = theirs(ids).logits, ours(ids).logits
    assert expected.dtype == got.dtype == torch.float64
    assert float((got - expected).abs().max() / expected.abs().max()) < FLOOR


@pytest.mark.parametrize("sizes", TOPOLOGIES, ids=str)
@pytest.mark.parametrize(
    "growth",
    [
        {"uniform": 2},
        {"uniform": 3},
        {"hidden": 2, "ffn": 3},
        {"signal": 2, "noise": 2},
        {"signal": 4, "noise": 4, "kv": 2},
    ],
    ids=str,
)
def test_transformers_sees_the_same_function_after_growth(
    tmp_path: Path, sizes: tuple[int, int, int, int, int, int, bool], growth: dict[str, int]
) -> None:
    """Source and grown model both run in `transformers`; each errs by `FLOOR` at most."""
    source = diffllama(sizes, seed=1)
    (tmp_path / "source").mkdir()
    config = {**motif_config(source.config), "model_type": "motif"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in as_motif(source).items()}
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    plan = make_plan(read_header(tmp_path / "source"), make_recipe(growth))
    expand(plan, tmp_path / "grown", weights_output(plan, 10**9))
    grown_config = json.loads((tmp_path / "grown" / "config.json").read_text())
    grown = as_diffllama(load_file(tmp_path / "grown" / "model.safetensors"), grown_config, source)
    assert sum(p.numel() for p in grown.parameters()) > sum(p.numel() for p in source.parameters())
    ids = torch.randint(40, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = source(ids).logits, grown(ids).logits
    assert float((got - expected).abs().max() / expected.abs().max()) < 2 * FLOOR
