"""Small random checkpoints in Motif's layout, written to a directory as a trainer would leave them."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from gdagrow.archs.motif import Motif
from gdagrow.models.gda import load_model

# What stands beside the weights of a published model and goes with one grown from it, by path and content.
COMPANIONS: Mapping[str, bytes] = {
    "tokenizer.json": b'{"version": "1.0", "model": {"type": "BPE"}}\n',
    "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}\n',
    "generation_config.json": b'{"do_sample": true}\n',
    "modeling_motif.py": b"raise SystemExit('remote code was executed')\n",
    "assets/chat_template.jinja": b"{{ messages }}\n",
}
# What stands beside them after training and does not go with a grown model.
TRAINING_STATE: Mapping[str, bytes] = {"optimizer.bin": b"moments", "trainer_state.json": b"{}\n"}
# Keys that no table reads; they must come through a growth as they are.
UNKNOWN_KEYS: Mapping[str, Any] = {
    "auto_map": {"AutoModelForCausalLM": "modeling_motif.MotifForCausalLM"},
    "initializer_range": 0.02,
    "x_note": "näive é",
}


def write_checkpoint(
    directory: Path,
    *,
    groups: int = 2,
    ratio: int = 3,
    kv_groups: int = 1,
    head_dim: int = 8,
    hidden: int = 32,
    ffn: int = 48,
    vocab: int = 61,
    layers: int = 2,
    activation: str = "poly_norm",
    tied: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    lambda_dtype: torch.dtype | None = None,
    seed: int = 0,
    scale: float = 0.2,
    plain: bool = False,
    max_shard_bytes: int | None = None,
    companions: bool = False,
    extra: Mapping[str, Any] = UNKNOWN_KEYS,
) -> dict[str, Any]:
    """Write a random checkpoint into `directory`, which is made if it is missing.

    Args:
        lambda_dtype: The dtype of `lambda_*`, which Motif creates in float32; `dtype` if None.
        scale: Standard deviation of the weights (norm weights lie around 1).
        plain: Leave `num_noise_heads` and `head_dim` out of the config, as plain differential attention does; needs
            ratio 1 and `hidden == 2 * groups * head_dim`.
        max_shard_bytes: Write shards of at most this many bytes of tensors with an index; one file if None.
        companions: Also write `COMPANIONS`.
        extra: Further keys of the config.

    Returns:
        The config.
    """
    config = {
        **extra, "model_type": "motif", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": groups * (ratio + 1), "num_key_value_heads": 2 * kv_groups, "num_noise_heads": groups,
        "head_dim": head_dim, "vocab_size": vocab, "hidden_act": activation, "tie_word_embeddings": tied,
        "use_bias": bias, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 128,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    if plain:
        assert ratio == 1, ratio
        assert hidden == 2 * groups * head_dim, (hidden, groups, head_dim)
        del config["num_noise_heads"], config["head_dim"]
    tensors = random_tensors(config, dtype=dtype, lambda_dtype=lambda_dtype or dtype, seed=seed, scale=scale)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    _write_weights(directory, tensors, max_shard_bytes)
    if companions:
        write_files(directory, COMPANIONS)
    return config


def write_training_state(directory: Path, **topology: Any) -> None:
    """Write a float32 checkpoint with the files of a run of the Trainer that made one step with AdamW."""
    write_checkpoint(directory, **{"dtype": torch.float32, **topology})
    model = load_model(directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule.step()
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    torch.save(schedule.state_dict(), directory / "scheduler.pt")
    (directory / "trainer_state.json").write_text('{"global_step": 1, "max_steps": 10, "log_history": []}')


def write_distributed_state(source: Path, directory: Path, **extra: Any) -> None:
    """Write a checkpoint's weights and zero moments of AdamW as one process saves them with torch, without a config.

    `extra`: further entries of the state dict, by key; `moments` is what replaces those of single parameters, by name.
    """
    weights = load_model(source).state_dict()
    kept = {
        name: {"step": torch.tensor(1.0)} | {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")}
        for name, weight in weights.items()
    }
    kept |= extra.pop("moments", {})
    groups = [{"lr": 1e-3, "betas": (0.9, 0.95), "params": list(weights)}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process
        state = {"model": weights, "optim": {"state": kept, "param_groups": groups}, **extra}
        dcp.save(state, checkpoint_id=directory, no_dist=True)


def random_tensors(
    config: Mapping[str, Any], *, dtype: torch.dtype, lambda_dtype: torch.dtype, seed: int, scale: float
) -> dict[str, torch.Tensor]:
    """Random weights for every row of the architecture's table, biases only if the config has `use_bias`."""
    motif, generator, tensors = Motif(), torch.Generator().manual_seed(seed), {}
    sizes = motif.sizes(config)
    for parameter in sorted(motif.table(config), key=lambda parameter: parameter.name):
        if parameter.optional and not config["use_bias"]:
            continue
        centre = 1.0 if "norm" in parameter.name or "subln" in parameter.name else 0.0
        stored = lambda_dtype if "lambda_" in parameter.name else dtype
        for layer in range(sizes.num_layers if parameter.is_layered else 1):
            values = torch.randn(parameter.parsed.shape(sizes.axes), generator=generator, dtype=torch.float64)
            tensors[parameter.name.format(layer=layer)] = (values * scale + centre).to(stored)
    return tensors


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files by relative path."""
    for path, content in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the weights of a checkpoint of one file, in place."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **keys: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def listing(directory: Path) -> dict[str, bytes | None]:
    """Everything under a directory: the content of files by relative path, None for directories."""
    return {
        path.relative_to(directory).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in sorted(directory.rglob("*"))
    }


def _write_weights(directory: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int | None) -> None:
    if max_shard_bytes is None:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
