"""The Trainer of `transformers`, with what a run needs of it beyond: sharding on CPUs, whole states, one schedule."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainingArguments

from gdagrow.record import RECORD_FILE
from gdagrow.train.configs import is_sharded
from gdagrow.train.dry_run import shares_of
from gdagrow.train.muon import MuonAndAdamW
from gdagrow.train.processes import on_cpu
from gdagrow.train.recipe import TrainRecipe
from gdagrow.train.run_directory import checkpoint_name, keep_last, publish, saving_directory, writing
from gdagrow.train.schedule import learning_rate_factor
from gdagrow.train.sharded import load_sharded, load_whole_optimizer
from gdagrow.train.state_files import refusing_what_is_not_plain

# What the Trainer calls them; it knows no Muon.
_OPTIMIZERS: Final = {"adamw": "adamw_torch", "sgd": "sgd", "muon": "adamw_torch"}


def arguments(recipe: TrainRecipe, run: Path, num_processes: int, *, evaluate_first: bool) -> TrainingArguments:
    """What the Trainer is told of a recipe."""
    at_once, accumulation = shares_of(recipe, num_processes)
    optimizer = recipe.optimizer
    sharding: Any = {}
    if num_processes > 1:
        fsdp = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True}
        sharding = {"fsdp": True, "fsdp_config": fsdp}
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
        use_cpu=on_cpu(recipe),
        dataloader_pin_memory=not on_cpu(recipe),
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        **sharding,
    )


class RunTrainer(Trainer):
    """The Trainer on a recipe's run directory.

    Several processes shard with FSDP2, on CPUs too; states appear whole; a state of any number of processes is loaded
    by any number.

    Args:
        recipe: The run.
        run: Its directory.
        record_in: The directory whose `growth.json`, if any, is this model's and goes with its states.
        model: With the weights to go on from, unless these are sharded.
        given: Anything else that the Trainer takes.
    """

    def __init__(
        self, recipe: TrainRecipe, run: Path, record_in: Path | None, model: PreTrainedModel, **given: Any
    ) -> None:
        self._recipe, self._run, self._trained = recipe, run, model
        record = record_in and record_in / RECORD_FILE
        # Read now: a run that keeps its last states alone removes the one that it goes on from.
        self._record = record.read_bytes() if record and record.exists() else None
        self._is_saving = False
        super().__init__(model=model, **given)

    def create_accelerator_and_postprocess(self) -> None:
        """Turn to FSDP2 on CPUs too, and keep the loss out of its mixed precision."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is None:
            return
        from accelerate.utils import (  # type: ignore[import-untyped]
            DistributedType,
            FullyShardedDataParallelPlugin,
        )
        from torch.distributed.fsdp import MixedPrecisionPolicy

        state = self.accelerator.state
        if self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            # accelerate knows FSDP on accelerators only, and on CPUs makes replicas without a word; told that it is
            # FSDP, all that it does works on CPUs as well.
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True
        if self.args.bf16:
            # accelerate's own policy casts the outputs too, and a loss in bfloat16 has three digits.
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            state.fsdp_plugin.mixed_precision_policy = policy

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The recipe's schedule; see `gdagrow.train.schedule`."""
        if not isinstance(self.lr_scheduler, LambdaLR):
            self.lr_scheduler = LambdaLR(optimizer or self._optimizer, partial(learning_rate_factor, self._recipe))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Matrices alone: by their names, lambdas, sub-norms and PolyNorm's weights would decay too."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() == 2]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The recipe's optimizer."""
        if self.optimizer is None and self._recipe.optimizer.name == "muon":
            self.optimizer = MuonAndAdamW(model or self._trained, self._recipe.optimizer)
        return super().create_optimizer(model)

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        assert self.optimizer is not None
        return self.optimizer

    # Loading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = Path(resume_from_checkpoint)
        if is_sharded(state):  # whole weights were loaded when the model was made
            if self.is_fsdp_enabled:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                load_sharded(state, self._trained)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state, scheduler = Path(checkpoint), self.create_scheduler(0)
        with refusing_what_is_not_plain(state, "scheduler.pt"):
            if is_sharded(state) == self.is_fsdp_enabled:
                super()._load_optimizer_and_scheduler(checkpoint)
            else:
                load = load_sharded if is_sharded(state) else load_whole_optimizer
                load(state, self._trained, self._optimizer)
                scheduler.load_state_dict(torch.load(state / "scheduler.pt", weights_only=True))
        self._follow_recipe(scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with refusing_what_is_not_plain(Path(checkpoint), "rng_state.pth"):
                super()._load_rng_state(checkpoint)

    def _follow_recipe(self, scheduler: LambdaLR) -> None:
        """Undo what a state says of the settings: the recipe says it, and a user may have changed it meanwhile."""
        settings, groups = self._recipe.optimizer, self._optimizer.param_groups
        factor = learning_rate_factor(self._recipe, scheduler.last_epoch)
        for number, group in enumerate(groups):
            group |= {key: getattr(settings, key) for key in ("betas", "momentum") if key in group}
            if "betas" in group:
                group["eps"] = settings.eps
            group |= {"initial_lr": settings.learning_rate, "lr": settings.learning_rate * factor}
            group["weight_decay"] = 0.0 if number == len(groups) - 1 else settings.weight_decay  # vectors come last
        scheduler.base_lrs = [settings.learning_rate for _ in groups]
        scheduler._last_lr = [group["lr"] for group in groups]  # what is logged

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        return str(saving_directory(self._run) if self._is_saving else self._run)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = checkpoint_name(self.state.global_step)
        with writing(self._run, name):
            self._save_whole(name, model, trial)

    def _save_whole(self, name: str, model: nn.Module, trial: Any) -> None:
        written = saving_directory(self._run) / name
        if self.args.should_save:
            shutil.rmtree(written, ignore_errors=True)
        self._wait()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        self._wait()
        if self.args.should_save:
            self._trained.config.save_pretrained(written)  # beside shards too, since growth needs it
            if self._record is not None:
                (written / RECORD_FILE).write_bytes(self._record)
            (written / "training_args.bin").unlink(missing_ok=True)  # a pickle, of settings that the recipe has
            publish(self._run, name)
            keep_last(self._run, self._recipe.keep)
        self._wait()

    def _wait(self) -> None:
        if dist.is_initialized():
            dist.barrier()
