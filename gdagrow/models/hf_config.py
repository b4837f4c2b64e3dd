"""Motif's `config.json` as a configuration of `transformers`."""

from typing import Any, Final

from transformers import PreTrainedConfig

from gdagrow.models.config import GdaConfig

# Keys that transformers renames or takes for its own, kept as they were read.
_KEPT_AS_READ: Final = ("model_type", "torch_dtype", "rope_scaling")


class MotifConfig(PreTrainedConfig):
    """What a Motif checkpoint's `config.json` says, under its own keys.

    Sizes and constants have no defaults: `gda` reads and checks them, and says what absent keys mean. A config that was
    read is written back with the keys that it had, `model_type` in the spelling that it had (`Motif` or `motif`).
    """

    model_type = "motif"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (the Trainer adds lists to it)

    tie_word_embeddings: bool = False
    use_cache: bool = True
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._as_read = {key: kwargs.pop(key) for key in _KEPT_AS_READ if key in kwargs}
        dtype = self._as_read.get("torch_dtype")
        if dtype is not None:
            kwargs["torch_dtype"] = dtype
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def gda(self) -> GdaConfig:
        """The sizes and constants of the model.

        Raises:
            CheckpointError: a key is missing or has a bad value, or asks for what the model does not have.
        """
        return GdaConfig.from_dict(self.to_dict())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        keys = frozenset(config_dict)
        result = super().from_dict(config_dict, **kwargs)
        (result[0] if isinstance(result, tuple) else result)._read_keys = keys
        return result

    def to_dict(self) -> dict[str, Any]:
        written: dict[str, Any] = super().to_dict()
        return self._as_it_was(written) | {key: self._as_read[key] for key in self._as_read if key != "torch_dtype"}

    def to_diff_dict(self) -> dict[str, Any]:
        written = self._as_it_was(super().to_diff_dict())
        return written | ({"torch_dtype": written.get("dtype")} if "torch_dtype" in self._as_read else {})

    def _as_it_was(self, written: dict[str, Any]) -> dict[str, Any]:
        """Without what is only ours, and without null for keys that were never there."""
        keys: frozenset[str] = getattr(self, "_read_keys", frozenset())
        return {
            key: value
            for key, value in written.items()
            if key not in ("_as_read", "_read_keys") and (value is not None or key in keys)
        }
