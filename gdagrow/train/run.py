"""A training run: legs of the Trainer, a growth on the disk between them, and all that makes it possible to go on."""

import gc
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from gdagrow.archs import trained_of
from gdagrow.errors import TrainError
from gdagrow.growing import grow_checkpoint
from gdagrow.header import Header
from gdagrow.record import RECORD_FILE
from gdagrow.train.beginning import begin
from gdagrow.train.building import build_model
from gdagrow.train.callbacks import FreezeCallback, GrowthCallback
from gdagrow.train.configs import is_sharded
from gdagrow.train.data import Windows, open_tokens, prepare_tokens, require_files
from gdagrow.train.dry_run import headers_of, shares_of
from gdagrow.train.engine import RunTrainer, arguments
from gdagrow.train.flow import RunCallback
from gdagrow.train.health_callback import HealthCallback
from gdagrow.train.metrics import GROWTH, MetricsFile
from gdagrow.train.processes import Processes
from gdagrow.train.recipe import MidRunGrowth, TrainRecipe
from gdagrow.train.run_directory import (
    METRICS_FILE,
    MODEL,
    RECIPE_FILE,
    TOKENS,
    RunState,
    grown_name,
    held,
    keep_last,
    last_state,
    publish,
    remove_unfinished,
    saving_directory,
    writing,
)
from gdagrow.train.state_files import make_model, read_state


class Watcher(Protocol):
    """Who looks on; told in the first process alone."""

    def step(self, step: int) -> None:
        """A step is done."""

    def line(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl was written."""


@dataclass(frozen=True)
class Finished:
    """A run that came to its end: where its model is, its steps, and the last figures of either loss."""

    model: Path
    steps: int
    loss: float | None
    eval_loss: float | None


def train(recipe: TrainRecipe, run: Path, *, resume: bool, restart: bool, watcher: Watcher) -> Finished:
    """Train as a recipe says, in this process or together with those that `torchrun` started beside it.

    Args:
        recipe: What to do.
        run: The run's directory; it may be missing.
        resume: Go on from the last whole state in it, or from the start if there is none.
        restart: Remove what an earlier run left in it.
        watcher: Told of every step and line.

    Raises:
        GdagrowError: the model, the data or the directory cannot be used, or the loss is not finite.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    processes = Processes(recipe)
    shares_of(recipe, processes.count)  # refuses a batch that does not divide
    last = None if restart else last_state(run)
    # Refuses what cannot grow so.
    start = headers_of(recipe, processes.count, done=last.step + last.grown if last else 0)[0]
    processes.meet()
    with held(run) if processes.is_first else nullcontext():
        try:
            finished = _begin_and_go_on(recipe, run, start, processes, watcher, resume=resume, restart=restart)
        except BaseException:
            if processes.is_first:
                remove_unfinished(run)  # perhaps for want of room
            raise
    processes.leave()
    return finished


def _begin_and_go_on(
    recipe: TrainRecipe, run: Path, start: Header, processes: Processes, watcher: Watcher, *, resume: bool,
    restart: bool,
) -> Finished:  # fmt: skip
    vocab = trained_of(start.config).sizes(start.config).vocab
    if processes.is_first:
        if not (run / TOKENS).exists() or restart:
            require_files(recipe.data)
        with writing(run, RECIPE_FILE):
            begin(recipe, run, resume=resume, restart=restart)
        if not (run / TOKENS).exists():
            with writing(run, TOKENS):
                prepare_tokens(recipe.data, saving_directory(run) / TOKENS, vocab, start.config.get("eos_token_id"))
                publish(run, TOKENS)
    processes.wait()
    training, held_out = open_tokens(recipe.data, run / TOKENS, recipe.context_length, vocab)
    if len(training) < recipe.batch_size:
        raise TrainError(
            f"data: {len(training)} sequences of {recipe.context_length} tokens are fewer than a batch of "
            f"{recipe.batch_size}; give more text or a smaller batch"
        )
    # A whole number of batches, so that the same sequences make a step however many processes share it.
    training = training.part(0, len(training) // recipe.batch_size * recipe.batch_size)
    held_out = held_out and held_out.part(0, min(len(held_out), recipe.evaluate_on))
    return _Run(recipe, run, start, training, held_out, processes, watcher).go_on()


class _Run:
    """A run with its text and its directory: legs between growths, each with a model and a Trainer of its own."""

    def __init__(
        self, recipe: TrainRecipe, run: Path, start: Header, training: Windows, held_out: Windows | None,
        processes: Processes, watcher: Watcher,
    ) -> None:  # fmt: skip
        self._recipe, self._run, self._start = recipe, run, start
        self._training, self._held_out = training, held_out
        self._processes, self._watcher = processes, watcher
        self._metrics: MetricsFile | None = None
        self._latest: dict[str, float] = {}

    def go_on(self) -> Finished:
        """Train and grow until all steps are done, and publish the model."""
        state = last_state(self._run)
        if self._processes.is_first:
            with writing(self._run, METRICS_FILE):
                self._metrics = MetricsFile(self._run / METRICS_FILE, state.step if state else 0)
        while state is None or state.step < self._recipe.steps:
            due = next((growth for growth in self._recipe.growth if state and growth.at == state.step), None)
            if due is not None and state is not None and not state.grown:
                state = self._grow(state, due)
            self._train(state)
            state = last_state(self._run)
        if self._processes.is_first:
            self._publish_model(state.directory)
            remove_unfinished(self._run)
        self._processes.wait()
        latest = self._latest
        return Finished(self._run / MODEL, state.step, latest.get("loss"), latest.get("eval_loss"))

    def _grow(self, state: RunState, growth: MidRunGrowth) -> RunState:
        name = grown_name(state.step)
        if self._processes.is_first:
            target = saving_directory(self._run) / name
            with writing(self._run, name):
                target.parent.mkdir(exist_ok=True)
                # The schedule is a function of the step here, so a state never needs to begin another one.
                grow_checkpoint(state.directory, target, growth.expand, moments=growth.moments, schedule="keep")
                publish(self._run, name)
                keep_last(self._run, self._recipe.keep)
        self._processes.wait()
        return RunState(state.step, True, self._run / name)

    def _train(self, state: RunState | None) -> None:
        """Go on from a state until the next growth or the end."""
        recipe, step = self._recipe, state.step if state else 0
        just_grown = state is not None and state.grown
        if just_grown:
            expand = next(growth.expand for growth in recipe.growth if growth.at == step)
            self._write({"step": step, "event": GROWTH, "expand": expand.as_dict()})
        stop_at = next((growth.at for growth in recipe.growth if growth.at > step), recipe.steps)
        directory = state.directory if state else None
        described = directory or recipe.model.directory
        trainer = RunTrainer(
            recipe,
            self._run,
            described,
            self._build(directory),
            args=arguments(recipe, self._run, self._processes.count, evaluate_first=just_grown and recipe.evaluates),
            train_dataset=self._training,
            eval_dataset=self._held_out,
            callbacks=[RunCallback(recipe, stop_at, self._write, self._tick), *self._callbacks(described, step)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(str(directory) if directory else None)
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _callbacks(self, directory: Path | None, step: int) -> list[TrainerCallback]:
        """What the last growth, or the start of the run, asks for."""
        recipe = self._recipe
        growth = next((growth for growth in reversed(recipe.growth) if growth.at <= step), None)
        at_step, freeze = (growth.at, growth.freeze) if growth else (0, recipe.freeze)
        found: list[TrainerCallback] = []
        if directory is not None and (directory / RECORD_FILE).exists():
            warm_up = growth.rewarm_up if growth else 0
            found.append(GrowthCallback(directory, multipliers=recipe.scales_rates, warm_up=warm_up, at_step=at_step))
        if freeze is not None:
            old: dict[str, Any] = {"old_heads_of": directory} if freeze.heads else {}
            old |= {"old_layers_of": directory} if freeze.layers == "old" else {"layers": freeze.layers}
            found.append(FreezeCallback(freeze.steps, at_step=at_step, **old))
        if recipe.health_every:
            found.append(HealthCallback(recipe.health_every, self._write, directory, at_step))
        return found

    def _build(self, state: Path | None) -> Any:
        """The model of a state, or of the start, with its weights unless these are sharded."""
        header = self._start if state is None else read_state(state)
        weights = self._recipe.model.directory if state is None else None if is_sharded(state) else state
        seed, is_first = self._recipe.seed, self._processes.is_first
        model = build_model(header.config, header.tensors, weights, seed, is_first=is_first)
        if self._recipe.gradient_checkpointing:
            name = "activation_checkpointing_enable"
            # The name before transformers 5.21, and so on Python 3.10.
            name = name if hasattr(model, name) else "gradient_checkpointing_enable"
            getattr(model, name)({"use_reentrant": False})
        return model

    def _publish_model(self, state: Path) -> None:
        target = saving_directory(self._run) / MODEL
        shutil.rmtree(target, ignore_errors=True)
        with writing(self._run, MODEL):
            target.parent.mkdir(exist_ok=True)
            make_model(self._recipe, state, target)
            publish(self._run, MODEL)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._latest |= {key: line[key] for key in ("loss", "eval_loss") if key in line}
        if self._metrics is not None:
            self._metrics.write(line)
            self._watcher.line(line)

    def _tick(self, step: int) -> None:
        if self._processes.is_first:
            self._watcher.step(step)
