"""The fast model against the loop-written reference: logits, gradients, loss, dtypes, causality."""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gdagrow.models.gda import GdaConfig, GdaModel, LayerCache, init_weights
from gdagrow.models.layers import PROJECTIONS, PolyNorm, RmsNorm
from tests.growths import RANDOM
from tests.reference import reference_logits

# Rounding in float64 (2.2e-16) adds up over a few hundred dependent operations in three layers; 4500 times eps.
FLOAT64_TOLERANCE = 1e-12

CONFIG: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 16,
    "num_key_value_heads": 4, "num_noise_heads": 4, "head_dim": 8, "vocab_size": 50, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6, "attn_rms_norm_eps": 1e-5, "hidden_act": "poly_norm", "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One random topology with the seed of its weights and text."""

    config: dict[str, Any]
    bias: frozenset[str]
    batch: int
    positions: int
    seed: int

    def model(self) -> GdaModel:
        return randomised(GdaModel(GdaConfig.from_dict(self.config), self.bias), self.seed)

    def ids(self) -> Tensor:
        shape = (self.batch, self.positions)
        return torch.randint(self.config["vocab_size"], shape, generator=torch.Generator().manual_seed(self.seed))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_groups, groups_per_kv, dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4))
    plain = draw(st.booleans())
    ratio = 1 if plain else draw(st.integers(1, 5))
    heads = kv_groups * groups_per_kv * (ratio + 1)
    config = {
        "hidden_size": draw(st.integers(2, 20)),
        "intermediate_size": draw(st.integers(2, 20)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": 2 * kv_groups,
        "vocab_size": draw(st.integers(2, 20)),
        "rope_theta": draw(st.sampled_from([100.0, 10000.0, 500000.0])),
        # Far apart, so that one eps used in place of another shows.
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "attn_rms_norm_eps": draw(st.sampled_from([1e-5, 1e-1])),
        "hidden_act": draw(st.sampled_from(["poly_norm", "silu"])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if not plain:
        config["num_noise_heads"] = kv_groups * groups_per_kv
    if draw(st.booleans()):
        config["head_dim"] = dim
    else:
        config["hidden_size"] = heads * dim
    bias = draw(st.frozensets(st.sampled_from(sorted(PROJECTIONS))))
    return Case(config, bias, draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(0, 2**31)))


def randomised(model: GdaModel, seed: int) -> GdaModel:
    """Float64, no parameter left at a round value: matrices of unit gain, everything else normal around its init."""
    model = model.double()
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            deviation = 1 / sqrt(parameter.shape[1]) if parameter.dim() == 2 else 0.3
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * deviation)
    return model


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest deviation over largest expected value."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).abs().max() / expected.abs().max())


@settings(max_examples=40, derandomize=True, deadline=None)
@given(cases())
def test_logits_are_those_of_the_reference(case: Case) -> None:
    model = case.model()
    expected = reference_logits(model.state_dict(), case.config, case.ids())
    assert relative_error(model(case.ids()).logits, expected) < FLOAT64_TOLERANCE


@settings(max_examples=15, derandomize=True, deadline=None)
@given(cases())
def test_gradients_are_those_of_the_reference(case: Case) -> None:
    model = case.model()
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(case.seed)
    direction = torch.randn(case.config["vocab_size"], dtype=torch.float64, generator=generator)
    expected = torch.autograd.grad(
        (reference_logits(parameters, case.config, case.ids()) @ direction).sum(), list(parameters.values())
    )
    (model(case.ids()).logits @ direction).sum().backward()
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        assert parameter.grad is not None, name
        # Backward has about three times the operations of forward, and a gradient may cancel to far below its terms.
        assert float((parameter.grad - gradient).abs().max()) < 10 * FLOAT64_TOLERANCE * largest, name


def test_loss_is_the_cross_entropy_of_the_next_token() -> None:
    case = Case(CONFIG, frozenset(), batch=3, positions=7, seed=1)
    ids, labels = case.ids(), case.ids().clone()
    labels[0, 3] = -100
    logits, loss = case.model()(ids, labels)
    terms = [
        -torch.log_softmax(logits[row, position], dim=0)[labels[row, position + 1]]
        for row in range(3) for position in range(6) if labels[row, position + 1] != -100
    ]  # fmt: skip
    assert len(terms) == 17
    assert loss is not None
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-14)


@pytest.mark.parametrize("act", ["poly_norm", "silu"])
@pytest.mark.parametrize(("dtype", "units"), [(torch.bfloat16, 10), (torch.float32, 30)], ids=["bf16", "float32"])
def test_lower_precision_stays_near_float64(dtype: torch.dtype, units: int, act: str) -> None:
    """The same rounded weights in `dtype` and in float64: what differs is only the rounding of activations.

    A value is rounded about ten times on its way through one of the two layers, each time by at most eps / 2 of a value
    of its own size: 2 * 10 * eps / 2. Beside bf16, norms, RoPE, lambda and the difference of the attentions are in
    float32; in a float32 model they are no better than the rest, and the difference may be a third of its terms.
    """
    case = Case({**CONFIG, "hidden_act": act}, PROJECTIONS, batch=2, positions=17, seed=2)
    low = case.model().to(dtype)
    high = case.model()
    high.load_state_dict(low.state_dict())
    output = low(case.ids(), case.ids())
    assert output.logits.dtype == dtype
    assert output.loss.dtype == torch.float32
    assert relative_error(output.logits, high(case.ids()).logits) < units * torch.finfo(dtype).eps
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in low.parameters())


def test_float32_lambdas_and_norms_beside_bf16_matrices() -> None:
    case = Case(CONFIG, frozenset(), batch=1, positions=5, seed=3)
    mixed = case.model().bfloat16()
    for name, parameter in mixed.named_parameters():
        if parameter.dim() == 1:
            parameter.data = case.model().get_parameter(name).data.float()
    high = case.model()
    high.load_state_dict(mixed.state_dict())
    logits = mixed(case.ids()).logits
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits, high(case.ids()).logits) < 10 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("module", [RmsNorm(64, 1e-6), PolyNorm()], ids=["rms", "poly"])
def test_norms_round_to_bf16_only_once(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(200, 64, generator=generator).bfloat16()
    got, exact = module.bfloat16()(x).double(), module.double()(x.double())
    # Half an eps of rounding to bf16, and what float32 leaves of terms that may cancel.
    allowed = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 100 * torch.finfo(torch.float32).eps
    assert ((got - exact).abs() <= allowed).all()


def test_a_later_token_changes_no_earlier_logit() -> None:
    case = Case(CONFIG, frozenset(), batch=2, positions=9, seed=4)
    model, ids = case.model(), case.ids()
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % CONFIG["vocab_size"]
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(dim=-1).any()


def test_blocks_can_be_run_one_by_one() -> None:
    case = Case(CONFIG, frozenset({"o_proj"}), batch=2, positions=6, seed=5)
    model = case.model()
    hidden = model.model.embed_tokens(case.ids())
    for layer in model.model.layers:
        hidden = layer(hidden)
    assert model.lm_head is not None
    assert torch.equal(model.lm_head(model.model.norm(hidden)), model(case.ids()).logits)


def test_meta_device_gives_shapes_without_memory() -> None:
    with torch.device("meta"):
        output = GdaModel(GdaConfig.from_dict(CONFIG))(torch.zeros(2, 6, dtype=torch.long))
    assert output.logits.shape == (2, 6, 50)


def test_init_depends_on_the_seed_only() -> None:
    models = [GdaModel(GdaConfig.from_dict(CONFIG)) for _ in range(3)]
    for model, seed in zip(models, (7, 7, 8), strict=True):
        init_weights(model, seed)
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert float(first[name].std()) == pytest.approx(0.02, rel=0.1)
    assert first["model.layers.0.mlp.act_fn.weight"].tolist() == pytest.approx([1 / 3] * 3)


@settings(RANDOM, max_examples=30)
@given(cases(), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_pieces_of_a_text_through_the_cache_are_the_whole_text(case: Case, pieces: list[int]) -> None:
    """Any cut of the text into pieces, one token or several at a time, gives the logits of all at once."""
    model = case.model()
    ids = torch.randint(case.config["vocab_size"], (2, sum(pieces)), generator=torch.Generator().manual_seed(case.seed))
    caches = [LayerCache() for _ in range(case.config["num_hidden_layers"])]
    with torch.no_grad():
        whole = model(ids).logits
        found = torch.cat([model(part, caches=caches).logits for part in ids.split(pieces, dim=1)], dim=1)
    assert [cache.length for cache in caches] == [sum(pieces)] * len(caches)
    assert (found - whole).abs().max() <= FLOAT64_TOLERANCE * whole.abs().max()
