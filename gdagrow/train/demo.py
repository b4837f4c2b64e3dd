"""Train a small GDA language model from scratch on Python's own source code: `python -m gdagrow.train.demo OUT_DIR`.

It exists to have a real checkpoint to grow a minute after installing, with nothing to download: the text is the
standard library of the running Python, the tokens are bytes, the result is a directory in Motif's layout.
"""

import argparse
import json
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import Tensor

from gdagrow.errors import GdagrowError, OutputError
from gdagrow.formats.byte_tokenizer import write_byte_tokenizer
from gdagrow.formats.publish import staged
from gdagrow.models.gda import GdaConfig, GdaModel, init_weights, load_model, save_model
from gdagrow.train.baselines import bigram_loss

# Tests, tables and bundled documents: text unlike the rest, which a small model would only waste its minute on.
SKIPPED_FOLDERS = frozenset({
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings",
    "ensurepip", "__pycache__",
})  # fmt: skip
VALIDATION_EVERY = 20
VALIDATION_WINDOWS = 256
SEED = 0
BATCH, POSITIONS = 4, 128
PEAK_RATE, FINAL_RATE, WARMUP_STEPS = 1e-3, 3e-4, 30
WEIGHT_DECAY = 0.1

CONFIG: dict[str, Any] = {
    "architectures": ["MotifForCausalLM"],
    "model_type": "motif",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_noise_heads": 2,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "k_ratio": 1,
    "vocab_size": 256,
    "max_position_embeddings": POSITIONS,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "attn_rms_norm_eps": 1e-5,
    "hidden_act": "poly_norm",
    "use_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": None,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}
GENERATION_CONFIG = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 128}


def standard_library_text() -> tuple[Tensor, Tensor]:
    """Training and validation bytes (uint8, one dim), split by file in the sorted order of paths."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)
    )
    validation = files[::VALIDATION_EVERY]
    training = sorted(set(files) - set(validation))
    return _read_bytes(root, training), _read_bytes(root, validation)


def _read_bytes(root: Path, files: list[str]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join((root / file).read_bytes() for file in files)), dtype=torch.uint8)


def windows(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random stretches of `text` as ids, `[count, POSITIONS]` int64."""
    starts = torch.randint(len(text) - POSITIONS, (count, 1), generator=generator)
    return text[starts + torch.arange(POSITIONS)].long()


@torch.no_grad()
def validation_loss(model: GdaModel, ids: Tensor) -> float:
    """Nats per byte on `ids` `[windows, POSITIONS]`."""
    losses = [
        F.cross_entropy(model(part).logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
        for part in ids.view(-1, 32, POSITIONS)
    ]
    return float(torch.stack(losses).mean())


def train(model: GdaModel, text: Tensor, seconds: float) -> Iterator[tuple[float, float]]:
    """Train with AdamW until `seconds` of wall clock have passed; after each step, the share of time used and the loss.

    The learning rate follows the clock, not the steps, so that it is down to its final value on any machine.
    """
    generator = torch.Generator().manual_seed(SEED)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    start, used, step = time.monotonic(), 0.0, 0
    while used < 1:
        step += 1
        rate = FINAL_RATE + (PEAK_RATE - FINAL_RATE) * (1 + cos(pi * used)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, step / WARMUP_STEPS)
        ids = windows(text, BATCH, generator)
        loss = model(ids, ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        used = min(1, (time.monotonic() - start) / seconds)
        yield used, loss.item()


def train_with_progress(model: GdaModel, text: Tensor, seconds: float) -> int:
    """Train under a progress bar; returns the number of steps."""
    columns = ("[progress.description]{task.description}", BarColumn(), TimeRemainingColumn())
    shown = TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s")
    start, steps = time.monotonic(), 0
    with Progress(*columns, shown) as progress:
        task = progress.add_task("training", total=1.0, loss=float("nan"), rate=0.0)
        for used, loss in train(model, text, seconds):
            steps += 1
            rate = steps * BATCH * POSITIONS / (time.monotonic() - start)
            progress.update(task, completed=used, loss=loss, rate=rate)
    return steps


def save(model: GdaModel, directory: Path) -> None:
    """Write the checkpoint into `directory`, in bf16 but for the lambdas, which Motif keeps in float32."""
    for name, parameter in model.named_parameters():
        if ".lambda_" not in name:
            parameter.data = parameter.data.bfloat16()
    try:
        save_model(model, directory, CONFIG)
        (directory / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG, indent=2) + "\n")
        write_byte_tokenizer(directory, POSITIONS)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{directory} cannot be written ({error}); give another directory") from None


def run(out_dir: Path, seconds: float) -> None:
    """Train for `seconds`, write `out_dir`, print the loss beside the bigram baseline.

    Raises:
        OutputError: `out_dir` is there already and not an empty directory, or cannot be written.
    """
    out_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
    with staged(out_dir.absolute()) as partial:
        training, validation = standard_library_text()
        held_out = windows(validation, VALIDATION_WINDOWS, torch.Generator().manual_seed(SEED))
        model = GdaModel(GdaConfig.from_dict(CONFIG))
        init_weights(model, SEED)
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"{size:,} parameters, {len(training):,} bytes of Python to train on, {seconds:g} seconds")
        steps = train_with_progress(model, training, seconds)
        save(model, partial)
        loss = validation_loss(load_model(partial, torch.float32), held_out)
    print(f"{steps} steps of {BATCH * POSITIONS} tokens")
    print(f"validation loss {loss:.3f} nats/byte, bigram baseline {bigram_loss(training, held_out):.3f} nats/byte")
    print(f"wrote {out_dir}")


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gdagrow.train.demo", description=__doc__.split(":")[0] + ".")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the checkpoint directory to write")
    parser.add_argument("--seconds", type=float, default=75.0, help="wall-clock seconds to train for (default 75)")
    arguments = parser.parse_args()
    if not 0 < arguments.seconds < float("inf"):
        parser.error(f"--seconds is {arguments.seconds:g}, expected a positive number")
    if "OMP_NUM_THREADS" not in os.environ and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        # Waiting threads that spin make two threads twenty times slower than one on a machine that is shared.
        torch.set_num_threads(1)
    try:
        run(arguments.out_dir, arguments.seconds)
    except GdagrowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
