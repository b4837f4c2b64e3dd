"""GDA models of the Motif layout in `transformers`: importing this module registers them.

After `import gdagrow.models.hf`, `AutoModelForCausalLM.from_pretrained(directory)` loads any source or grown directory
without remote code.
"""

try:
    from transformers import AutoConfig, AutoModelForCausalLM
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    told = "gdagrow.models.hf needs the transformers package: pip install 'gdagrow[hf]'"
    raise ModuleNotFoundError(told, name=error.name) from None
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gdagrow.models.hf_config import MotifConfig
from gdagrow.models.hf_model import MotifForCausalLM, MotifModel

__all__ = ["MotifConfig", "MotifForCausalLM", "MotifModel", "register"]


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know the layout, under both spellings of its `model_type`."""
    AutoConfig.register("motif", MotifConfig, exist_ok=True)
    # `AutoConfig.register` wants one class for each spelling.
    CONFIG_MAPPING.register("Motif", MotifConfig, exist_ok=True)
    AutoModelForCausalLM.register(MotifConfig, MotifForCausalLM, exist_ok=True)


register()
