"""The Trainer of `transformers`, with what a run needs of it beyond: sharding on CPUs, whole states, one schedule."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from gdagrow.record import RECORD_FILE
from gdagrow.train.configs import is_sharded
from gdagrow.train.dry_run import shares_of
from gdagrow.train.recipe import TrainRecipe
from gdagrow.train.run_directory import checkpoint_name, keep_last, publish, saving_directory
from gdagrow.train.schedule import learning_rate_factor
from gdagrow.train.sharded import load_sharded, load_whole_optimizer

_OPTIMIZERS: Final = {"adamw": "adamw_torch", "sgd": "sgd"}


def arguments(recipe: TrainRecipe, run: Path, num_processes: int, *, evaluate_first: bool) -> TrainingArguments:
    """What the Trainer is told of a recipe."""
    at_once, accumulation = shares_of(recipe, num_processes)
    optimizer = recipe.optimizer
    fsdp = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True}
    return TrainingArguments(
        output_dir=str(run),
        max_steps=recipe.steps,
        per_device_train_batch_size=at_once,
        per_device_eval_batch_size=at_once,
        gradient_accumulation_steps=accumulation,
        optim=_OPTIMIZERS[optimizer.name],
        optim_args=f"momentum={optimizer.momentum}" if optimizer.name == "sgd" else None,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        max_grad_norm=optimizer.max_grad_norm,
        bf16=recipe.precision == "bf16",
        torch_compile=recipe.compile,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,  # it would log a loss of NaN as 0
        save_strategy="steps",
        save_steps=recipe.save_every,
        eval_strategy="steps" if recipe.evaluates and recipe.evaluate_every else "no",
        eval_steps=recipe.evaluate_every or None,
        eval_on_start=evaluate_first,
        prediction_loss_only=True,
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=recipe.device == "cpu",
        dataloader_pin_memory=recipe.device != "cpu" and torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        **({"fsdp": True, "fsdp_config": fsdp} if num_processes > 1 else {}),
    )


class RunTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """The Trainer on a recipe's run directory.

    Several processes shard with FSDP2, on CPUs too; states appear whole; a state of any number of processes is loaded
    by any number.

    Args:
        recipe: The run.
        state_of: The directory whose `growth.json`, if any, belongs to this model and goes with its states.
    """

    def __init__(self, *, recipe: TrainRecipe, state_of: Path | None, **given: Any) -> None:
        self._recipe, self._state_of = recipe, state_of
        self._is_saving = False
        super().__init__(**given)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is None:
            return
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
        from torch.distributed.fsdp import MixedPrecisionPolicy

        state = self.accelerator.state
        if self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            # accelerate turns to FSDP on accelerators only and falls back to replicas without a word; all that it does
            # then works on CPUs as well.
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True
        if self.args.bf16:
            # accelerate's own policy casts the outputs too, and a loss in bfloat16 has three digits.
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            state.fsdp_plugin.mixed_precision_policy = policy

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The recipe's schedule; see `gdagrow.train.schedule`."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, partial(learning_rate_factor, self._recipe))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # Loading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = Path(resume_from_checkpoint)
        if is_sharded(state):  # whole weights were loaded when the model was made
            if self.is_fsdp_enabled:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                load_sharded(state, self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = Path(checkpoint)
        if is_sharded(state) != self.is_fsdp_enabled:
            if is_sharded(state):
                load_sharded(state, self.model, self.optimizer)
            else:
                load_whole_optimizer(state, self.model, self.optimizer)
            self.lr_scheduler.load_state_dict(torch.load(state / "scheduler.pt", weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        self._follow_recipe()

    def _follow_recipe(self) -> None:
        """Undo what a state says of the settings: the recipe says it, and a user may have changed it meanwhile."""
        settings = self._recipe.optimizer
        values: dict[str, Any] = {"initial_lr": settings.learning_rate}
        values |= {"betas": settings.betas, "eps": settings.eps} if settings.name == "adamw" else {
            "momentum": settings.momentum
        }  # fmt: skip
        factor = learning_rate_factor(self._recipe, self.lr_scheduler.last_epoch)
        for number, group in enumerate(self.optimizer.param_groups):
            decay = 0.0 if number else settings.weight_decay  # the Trainer puts what decays first
            group.update(values, lr=settings.learning_rate * factor, weight_decay=decay)
        self.lr_scheduler.base_lrs = [settings.learning_rate] * len(self.optimizer.param_groups)

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        run = Path(self.args.output_dir)
        return str(saving_directory(run) if self._is_saving else run)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run, name = Path(self.args.output_dir), checkpoint_name(self.state.global_step)
        partial_state = saving_directory(run) / name
        if self.args.should_save:
            shutil.rmtree(partial_state, ignore_errors=True)
        self._wait()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        self._wait()
        if self.args.should_save:
            self.model.config.save_pretrained(partial_state)
            if self._state_of is not None and (self._state_of / RECORD_FILE).exists():
                shutil.copyfile(self._state_of / RECORD_FILE, partial_state / RECORD_FILE)
            (partial_state / "training_args.bin").unlink(missing_ok=True)  # a pickle, of settings that the recipe has
            publish(run, name)
            keep_last(run, self._recipe.keep)
        self._wait()

    def _wait(self) -> None:
        if dist.is_initialized():
            dist.barrier()
