"""GDA against standard attention with as many query heads, and against differential attention, at 1024 tokens.

All have 16 query heads of width 64, 8 key heads of width 64, the same hidden size, FFN (SiLU) and layers. Of the query
heads GDA 3:1 has 12 for signal and 4 for noise, and differential attention 8 and 8: each makes a map of its own, so all
models make 16 maps a layer. Values are twice as wide (4 heads of 128) as those of the standard model (8 of 64), which
is the same `v_proj`; `o_proj` reads 12 x 128 and 8 x 128 features where the standard model has 16 x 64. `gda, PolyNorm`
is GDA 3:1 with the activation of Motif. The standard model is `LlamaForCausalLM` of transformers with `sdpa`.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import Case, Figures, Settings, compare
from processes import timed

TOKENS, HIDDEN, FFN, LAYERS, HEADS, KEYS, HEAD_DIM, VOCAB = 1024, 1024, 2816, 1, 16, 8, 64, 256
_NOISE_HEADS = {"gda": 4, "differential": 8, "gda, PolyNorm": 4}
ARMS = ("standard", *_NOISE_HEADS)
LAYER_ARMS = ("standard", "gda", "differential")  # an activation is no part of attention
_CASES = (("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2))


def speed(settings: Settings) -> Iterator[Case]:
    """Seconds of the models, and of one attention layer of each, forward and with backward."""
    for dtype, threads in _CASES[: 1 if settings.quick else None]:
        if settings.only in f"{dtype}, {threads}":
            tokens = 32 if settings.quick else TOKENS
            run = timed([sys.executable, __file__, dtype, str(settings.num_rounds(5)), str(tokens)], _threads(threads))
            for found in json.loads(run.stdout.splitlines()[-1]):
                yield Case(**{**found, "facts": {**found["facts"], "threads": threads}})


def memory(settings: Settings) -> Iterator[Case]:
    """The peak of each model in float32, each in a process of its own."""
    tokens = 32 if settings.quick else TOKENS
    command = [sys.executable, __file__, "memory", "0", str(tokens)]
    arms = {arm: lambda arm=arm: json.loads(timed([*command, arm], _threads(1)).stdout.splitlines()[-1])
            for arm in ARMS}  # fmt: skip
    yield compare("float32", {"tokens": tokens, "threads": 1}, arms, 1)


def profile(settings: Settings) -> Iterator[Case]:
    """Where the time of one attention layer goes, forward, on one thread."""
    tokens = 32 if settings.quick else TOKENS
    run = timed([sys.executable, __file__, "profile", str(settings.num_rounds(5)), str(tokens)], _threads(1))
    yield from (Case(**found) for found in json.loads(run.stdout.splitlines()[-1]))


def _threads(number: int) -> dict[str, str]:
    # Idle threads sleep, since two that spin collapse where a core is taken.
    return {"OMP_NUM_THREADS": str(number), "MKL_NUM_THREADS": str(number), "OMP_WAIT_POLICY": "PASSIVE"}


def build(arm: str) -> Any:
    """A random model in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gdagrow.models.gda import GdaConfig, GdaModel, init_weights

    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
             "num_key_value_heads": KEYS, "head_dim": HEAD_DIM, "vocab_size": VOCAB, "tie_word_embeddings": True,
             "rms_norm_eps": 1e-6}  # fmt: skip
    if arm == "standard":
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa"))
    activation = "poly_norm" if "PolyNorm" in arm else "silu"
    config = {**sizes, "num_noise_heads": _NOISE_HEADS[arm], "hidden_act": activation, "rope_theta": 10000.0}
    model = GdaModel(GdaConfig.from_dict(config))
    init_weights(model, 0)
    return model


def measure_speed(dtype: str, rounds: int, tokens: int) -> list[Case]:
    import torch

    models = {arm: build(arm).to(getattr(torch, dtype)) for arm in ARMS}
    ids = torch.randint(VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(1, tokens, HIDDEN).to(getattr(torch, dtype))
    turns = models["standard"].model.rotary_emb(inputs, torch.arange(tokens)[None])
    layers = {arm: _attention(arm, models[arm], turns) for arm in LAYER_ARMS}
    steps: dict[str, dict[str, Callable[[], Any]]] = {
        "model, forward": {arm: lambda m=model: _forward(m, ids) for arm, model in models.items()},
        "model, forward and backward": {arm: lambda m=model: _backward(m, ids) for arm, model in models.items()},
        "attention, forward": {arm: lambda a=layer: _attend(a, inputs, False) for arm, layer in layers.items()},
        "attention, forward and backward": {arm: lambda a=layer: _attend(a, inputs, True)
                                            for arm, layer in layers.items()},
    }  # fmt: skip
    parameters = {arm: sum(p.numel() for p in model.parameters()) for arm, model in models.items()}
    facts = {"tokens": tokens, "dtype": dtype, "parameters": parameters}
    found = []
    for name, arms in steps.items():
        for step in arms.values():
            step()
        timers = {arm: lambda step=step: _clocked(step) for arm, step in arms.items()}
        found.append(compare(f"{dtype}, {torch.get_num_threads()} threads, {name}", facts, timers, rounds))
    return found


def measure_profile(dtype: str, rounds: int, tokens: int) -> Case:
    import torch

    inputs = torch.randn(1, tokens, HIDDEN).to(getattr(torch, dtype))
    models = {arm: build(arm).to(inputs.dtype) for arm in LAYER_ARMS}
    turns = models["standard"].model.rotary_emb(inputs, torch.arange(tokens)[None])
    layers = {arm: _attention(arm, model, turns) for arm, model in models.items()}
    for layer in layers.values():
        _attend(layer, inputs, False)
    arms = {arm: lambda layer=layer: _by_kind(lambda: _attend(layer, inputs, False)) for arm, layer in layers.items()}
    return compare(f"{dtype}, attention, forward", {"tokens": tokens, "dtype": dtype, "threads": 1}, arms, rounds)


def _by_kind(step: Callable[[], Any]) -> Figures:
    """Milliseconds in torch's operations, by kind."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    with profiled(activities=[ProfilerActivity.CPU]) as found:
        step()
    kinds = {"aten::mm": "projections", "aten::_scaled_dot_product_flash_attention_for_cpu": "kernel"}
    figures = {"kernel": 0.0, "projections": 0.0, "rest": 0.0}
    for event in found.key_averages():
        figures[kinds.get(event.key, "rest")] += event.self_cpu_time_total / 1000
    return {kind: round(milliseconds, 2) for kind, milliseconds in figures.items()}


def measure_memory(arm: str, tokens: int) -> Figures:
    """MiB that a forward takes at its peak, and one with backward, above the model itself, gradients included."""
    import torch

    model = build(arm)
    ids = torch.randint(VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))
    _forward(model, ids[:, :8])
    before = _status("VmRSS")
    peaks = {}
    for name, step in (("forward_mib", _forward), ("backward_mib", _backward)):
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what there is
        step(model, ids)
        peaks[name] = round((_status("VmHWM") - before) / 1024, 1)
    return peaks


def _attention(arm: str, model: Any, turns: Any) -> Callable[[Any], Any]:
    layer = model.model.layers[0].self_attn
    if arm == "standard":
        return lambda hidden: layer(hidden, position_embeddings=turns, attention_mask=None)[0]
    return layer


def _forward(model: Any, ids: Any) -> None:
    import torch

    with torch.no_grad():
        model(input_ids=ids)


def _backward(model: Any, ids: Any) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


def _attend(layer: Callable[[Any], Any], inputs: Any, with_gradients: bool) -> None:
    import torch

    with torch.set_grad_enabled(with_gradients):
        output = layer(inputs.clone().requires_grad_(with_gradients))
        if with_gradients:
            output.sum().backward()


def _clocked(step: Callable[[], Any]) -> Figures:
    start, cpu = time.perf_counter(), time.process_time()
    step()
    return {"wall": round(time.perf_counter() - start, 4), "cpu": round(time.process_time() - cpu, 4)}


def _status(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])


if __name__ == "__main__":
    what, number, length, *arm = sys.argv[1:]
    if what == "memory":
        print(json.dumps(measure_memory(arm[0], int(length))))
    elif what == "profile":
        found = [measure_profile(dtype, int(number), int(length)) for dtype in ("float32", "bfloat16")]
        print(json.dumps([asdict(case) for case in found]))
    else:
        print(json.dumps([asdict(case) for case in measure_speed(what, int(number), int(length))]))
