"""Models to grow towards, by their configs: published ones by name, others by directory or config file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gdagrow.archs import Architecture, Sizes, architecture_of
from gdagrow.errors import RecipeError
from gdagrow.formats.strict_json import parse_object

CONFIG: Final = "config.json"
_MAX_CONFIG_BYTES: Final = 10_000_000

# Where an architecture keeps the eps of its per-head norm, and what stands for an absent key.
_HEAD_NORM_EPS: Final[Mapping[str, tuple[str, float | None]]] = {
    "motif": ("attn_rms_norm_eps", 1e-5), "diffllama": ("rms_norm_eps", None),
}  # fmt: skip
HIDDEN_NORM_EPS: Final = "rms_norm_eps"
_DEFAULT_ROPE_THETA: Final = {"diffllama": 10000.0}  # of DiffLlamaConfig

# What the published configs say of sizes, embeddings and RoPE. Keys that are not here are taken from the source.
_MOTIF: Final = {"model_type": "Motif", "hidden_act": "poly_norm", "head_dim": 128, "vocab_size": 219520}
TARGETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "motif-2.6b": _MOTIF | {
        "hidden_size": 2048, "num_hidden_layers": 32, "intermediate_size": 8192, "num_attention_heads": 16,
        "num_key_value_heads": 16, "tie_word_embeddings": True, "rope_theta": 500000.0,
        "max_position_embeddings": 16384,
    },
    "motif-2-12.7b": _MOTIF | {
        "hidden_size": 4096, "num_hidden_layers": 40, "intermediate_size": 16384, "num_attention_heads": 40,
        "num_key_value_heads": 16, "num_noise_heads": 8, "tie_word_embeddings": False, "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
    },
}  # fmt: skip


def read_target(text: str) -> Mapping[str, Any]:
    """Read the config of a model to grow towards.

    Args:
        text: A directory with a `config.json`, such a file, or one of `TARGETS` in any case. What exists goes first.

    Raises:
        RecipeError: it is none of these.
        CheckpointError: the file is no JSON object.
    """
    path = Path(text)
    file = path / CONFIG if path.is_dir() else path
    if not path.exists() and text.lower() in TARGETS:
        return TARGETS[text.lower()]
    try:
        with file.open("rb") as stream:
            raw = stream.read(_MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(
            f"like {text}: {file} cannot be read ({reason}); give a directory with a {CONFIG}, such a file, or one of "
            f"{', '.join(TARGETS)}"
        ) from None
    if len(raw) > _MAX_CONFIG_BYTES:
        raise RecipeError(
            f"like {text}: {file} is larger than {_MAX_CONFIG_BYTES} bytes, which no config is; give a {CONFIG}"
        )
    return parse_object(raw, f"like {text}: {file}")


@dataclass(frozen=True)
class DescribedModel:
    """A model as its config describes it, whatever its layout calls things."""

    config: Mapping[str, Any]
    architecture: Architecture
    sizes: Sizes

    @staticmethod
    def of(config: Mapping[str, Any]) -> "DescribedModel":
        architecture = architecture_of(config)
        return DescribedModel(config, architecture, architecture.sizes(config))

    @property
    def is_tied(self) -> bool:
        return self.architecture.is_tied(self.config)

    @property
    def _rope(self) -> Mapping[str, Any]:
        found = self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        return found if isinstance(found, Mapping) else {"rope_scaling": found}

    @property
    def rope_scaling(self) -> dict[str, Any]:
        """What the config asks of RoPE beside its base."""
        plain = {"rope_type": "default", "type": "default"}
        return {key: value for key, value in self._rope.items() if key != "rope_theta" and plain.get(key) != value}

    @property
    def rope_theta(self) -> Any:
        """The base of RoPE, where `transformers` 5 or one before it writes it; None if the config does not say it."""
        default = _DEFAULT_ROPE_THETA.get(self.architecture.name)
        return self._rope.get("rope_theta") or self.config.get("rope_theta") or default

    @property
    def has_one_eps(self) -> bool:
        """Whether the layout has one eps for its hidden norms and its head norms."""
        return _HEAD_NORM_EPS[self.architecture.name][0] == HIDDEN_NORM_EPS

    @property
    def head_norm_eps(self) -> Any:
        key, default = _HEAD_NORM_EPS[self.architecture.name]
        return self.config.get(key) or default
