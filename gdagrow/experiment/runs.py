"""All runs of an experiment: a sweep of learning rates for every arm, then every arm with every seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Final, Protocol

from gdagrow.errors import OutputError, TrainError
from gdagrow.experiment.arms import Arm, make_arms
from gdagrow.experiment.jobs import DIVERGED_FILE, Job, lines_of, require_same
from gdagrow.experiment.recipe import ExperimentRecipe, rate_name
from gdagrow.experiment.text import PreparedText, prepare_text
from gdagrow.experiment.workers import Workers, alone_in

RUNS: Final = "runs"
TEXTS: Final = "text"


class Watcher(Protocol):
    """Who looks on."""

    def stage(self, told: str, jobs: Sequence[Job]) -> None:
        """These jobs are next; some of them may be done already."""

    def step(self, job: Job, step: int) -> None:
        """A step of a job is done."""

    def done(self, job: Job, loss: float | None) -> None:
        """A job is done, at this held-out loss; None if it diverged."""

    def failed(self, job: Job, error: str) -> None:
        """A job cannot be done."""


@dataclass(frozen=True)
class Experiment:
    """An experiment with its directory, its arms and its texts."""

    recipe: ExperimentRecipe
    directory: Path
    arms: Mapping[str, Arm]

    @classmethod
    def planned(cls, recipe: ExperimentRecipe, directory: Path) -> "Experiment":
        """Make the arms; nothing is read but the recipe, nothing is written.

        Raises:
            GdagrowError: an arm is no training run, or cannot be matched.
        """
        directory = directory.absolute()
        return cls(recipe, directory, make_arms(recipe, directory / TEXTS))

    def prepare_texts(self) -> dict[str, PreparedText]:
        """The texts that arms use, split and as tokens; made where they are not there yet.

        Raises:
            GdagrowError: a text is missing, or was made of other documents.
        """
        used = {arm.text for arm in self.arms.values()}
        return {name: self._prepared(name) for name in self.recipe.texts if name in used}

    def _prepared(self, name: str) -> PreparedText:
        source, directory = self.recipe.texts[name], self.directory / TEXTS / name
        begun = [
            arm.name for arm in self.arms.values() if arm.text == name and (self.directory / RUNS / arm.name).exists()
        ]
        if begun and not directory.exists():
            raise TrainError(
                f"{directory} is gone, on which {', '.join(begun)} were trained, and what is made anew may be another "
                "text; restore it, or choose another --out"
            )
        lengths = {arm.recipe.context_length for arm in self.arms.values() if arm.text == name}
        if wrong := [length for length in lengths if max(lengths) % length]:
            raise TrainError(
                f"text {name}: context_length {wrong[0]} does not divide {max(lengths)}, that of another arm, so the "
                "two could not be held against the same text; choose multiples"
            )
        return prepare_text(
            source.documents, source.kind, directory, held_out=source.held_out,
            stretch=max(lengths), exclude=source.exclude,
        )  # fmt: skip

    # Jobs

    def sweep(self) -> list[Job]:
        """The sweep of learning rates, for every arm that does not take that of another one."""
        tune = self.recipe.tune
        if tune is None:
            return []
        return [
            Job(
                f"{arm.name}, learning rate {rate_name(rate)}",
                self.directory / RUNS / arm.name / f"rate-{rate_name(rate)}",
                arm.at(rate, tune.seed, steps=tune.steps),
                may_diverge=True,
            )
            for name, arm in self.arms.items() if self._swept(name) == name for rate in tune.learning_rates
        ]  # fmt: skip

    def tuning(self) -> dict[str, dict[float, float]]:
        """Held-out losses of what is done of the sweep, by arm and learning rate; infinite where a run diverged."""
        found: dict[str, dict[float, float]] = {}
        for job in self.sweep():
            if job.is_done:
                rates = found.setdefault(job.directory.parent.name, {})
                loss = final_loss(job)
                rates[job.recipe.optimizer.learning_rate] = inf if loss is None else loss
        return found

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of every arm: the best one of its sweep, or of all sweeps together, or that of the recipe.

        Raises:
            TrainError: every rate of a sweep diverged.
        """
        tuning, tune = self.tuning(), self.recipe.tune
        if tune is not None and tune.shared:
            mean = {rate: fmean(losses[rate] for losses in tuning.values()) for rate in tune.learning_rates}
            return dict.fromkeys(self.arms, _best(mean, "all arms"))
        found = {}
        for name, arm in self.arms.items():
            swept = tuning.get(self._swept(name))
            found[name] = _best(swept, f"arm {name}") if swept else arm.recipe.optimizer.learning_rate
        return found

    def _swept(self, name: str) -> str:
        """The arm whose sweep decides the learning rate of another one."""
        spec = self.recipe.arms[name]
        return self._swept(spec.grown_from) if spec.grown_from else spec.learning_rate_of or name

    def runs(self) -> list[Job]:
        """Every arm with every seed, seed by seed: what is done is balanced whenever it ends. Needs the sweep."""
        rates = self.learning_rates()
        first = [arm for arm in self.arms.values() if arm.fork is None]
        forks = [arm for arm in self.arms.values() if arm.fork is not None]
        return [self.job(arm, seed, rates[arm.name]) for seed in self.recipe.seeds for arm in (*first, *forks)]

    def job(self, arm: Arm, seed: int, rate: float) -> Job:
        """The run of an arm with a seed."""
        maps = self.recipe.maps
        is_mapped = maps is not None and seed in self.recipe.seeds[: maps.seeds]
        kept = tuple(
            sorted({other.fork for other in self.arms.values() if other.spec.grown_from == arm.name and other.fork})
        )
        recipe = arm.at(rate, seed)
        if kept or is_mapped:  # all states stay until the run is done
            recipe = recipe.model_copy(update={"keep": recipe.steps // recipe.save_every + 3})
        forked = arm.spec.grown_from and self._directory(arm.spec.grown_from, seed)
        return Job(
            f"{arm.name}, seed {seed}", self._directory(arm.name, seed), recipe, forked or None, arm.fork or 0, kept,
            maps.every if maps and is_mapped else 0, maps.sequences if maps else 0,
        )  # fmt: skip

    def _directory(self, arm: str, seed: int) -> Path:
        return self.directory / RUNS / arm / f"seed-{seed}"

    # Running

    def run(self, num_workers: int, watcher: Watcher) -> list[str]:
        """Run what is not done yet; needs the texts.

        Returns:
            What could not be run and why; everything else is done.

        Raises:
            GdagrowError: the directory is in use, or has runs of another recipe.
            RuntimeError: a bug showed in a worker, whose trace is the cause.
        """
        try:
            (self.directory / RUNS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.directory} cannot be made ({error.strerror}); choose another --out") from None
        with alone_in(self.directory), Workers(num_workers, self.directory) as workers:
            errors = _run_all(self.sweep(), workers, watcher, "learning rates")
            return errors or _run_all(self.runs(), workers, watcher, "arms")


def _best(losses: Mapping[float, float], whose: str) -> float:
    """The learning rate with the lowest loss, the lower one of equals."""
    if min(losses.values()) == inf:
        raise TrainError(f"{whose}: every learning rate of the sweep diverged; give lower ones")
    return min(losses, key=lambda rate: (losses[rate], rate))


def final_loss(job: Job) -> float | None:
    """The last held-out loss of a run that is done; None if it diverged."""
    if (job.directory / DIVERGED_FILE).exists():
        return None
    return [float(line["eval_loss"]) for line in lines_of(job) if "eval_loss" in line][-1]


def _run_all(jobs: Sequence[Job], workers: Workers, watcher: Watcher, told: str) -> list[str]:
    for job in jobs:
        require_same(job)
    watcher.stage(told, jobs)
    by_directory = {job.directory: job for job in jobs}
    left, failed = [job for job in jobs if not job.is_done], dict[Path, str]()
    while left or workers.is_busy:
        due = next((job for job in left if _is_ready(job, by_directory)), None) if workers.is_free else None
        if due is not None:
            left.remove(due)
            workers.begin(due)
            continue
        if not workers.is_busy:
            break  # what is left goes on from what failed
        finished = workers.wait(watcher.step)
        job = finished.job
        if finished.error is None:
            watcher.done(job, final_loss(job))
        elif finished.trace is not None:
            raise RuntimeError(f"{job.told}: {finished.error}") from RuntimeError(finished.trace)
        else:
            failed[job.directory] = f"{job.told}: {finished.error}"
            watcher.failed(job, finished.error)
    return list(failed.values())


def _is_ready(job: Job, by_directory: Mapping[Path, Job]) -> bool:
    return job.forked_from is None or by_directory[job.forked_from].is_done
