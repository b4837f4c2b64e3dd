"""What the runs of an experiment came to, read from their directories, as far as they are done."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from math import isfinite
from platform import python_version
from statistics import fmean
from typing import Any, Final

from gdagrow.experiment.arms import Arm
from gdagrow.experiment.jobs import MAPS_FILE, Job, lines_of
from gdagrow.experiment.recipe import ExperimentRecipe
from gdagrow.experiment.results import Arm as MeasuredArm
from gdagrow.experiment.results import Comparison, Maps, Results, Run, Text
from gdagrow.experiment.runs import Experiment, final_loss
from gdagrow.experiment.statistics import detectable
from gdagrow.experiment.text import PreparedText
from gdagrow.train.metrics import GROWTH, HEALTH

_PACKAGES: Final = ("gdagrow", "torch", "transformers", "accelerate", "numpy", "scipy")
# The steps after a growth in which the loss is off, whatever becomes of it later.
_TRANSIENT_STEPS: Final = 20


def gather(
    experiment: Experiment, texts: Mapping[str, PreparedText], *, name: str, scale: str, command: str
) -> Results:
    """Everything that is known so far.

    Args:
        experiment: With its directory.
        texts: Its texts, prepared.
        name, scale, command: What it is called, at which scale it is, and what ran it.
    """
    recipe, rates = experiment.recipe, experiment.learning_rates()
    jobs = {(arm.name, seed): experiment.job(arm, seed, rates[arm.name])
            for arm in experiment.arms.values() for seed in recipe.seeds}  # fmt: skip
    sd = recipe.planned.sd
    return Results(
        experiment=name,
        title=recipe.title,
        question=recipe.question,
        scale=scale,
        command=command,
        versions={"python": python_version(), **{package: version(package) for package in _PACKAGES}},
        recipe=recipe_as_kept(recipe),
        seeds=recipe.seeds,
        planned={"sd": sd, "detectable": detectable(sd, len(recipe.seeds))},
        texts=tuple(
            Text(key, ", ".join(recipe.texts[key].documents), text.documents, text.tokens, text.bigram, text.gzip)
            for key, text in texts.items()
        ),
        arms=tuple(_measured_arm(arm, rates[arm.name]) for arm in experiment.arms.values()),
        comparisons=tuple(Comparison(c.told, c.matched, c.reference, c.arms) for c in recipe.comparisons),
        tuning={
            arm: {f"{rate:g}": loss for rate, loss in losses.items() if isfinite(loss)}
            for arm, losses in experiment.tuning().items()
        },
        runs=tuple(
            _measured_run(arm, seed, job, jobs) for (arm, seed), job in jobs.items() if job.is_done
        ),
    )  # fmt: skip


def recipe_as_kept(recipe: ExperimentRecipe) -> dict[str, Any]:
    """A recipe as results keep it: what it says, as JSON has it."""
    kept: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"scales"})
    return kept


def _measured_arm(arm: Arm, rate: float) -> MeasuredArm:
    sizes, heads, growth = arm.sizes, arm.sizes.heads, arm.recipe.growth[0] if arm.recipe.growth else None
    noise = heads.num_query_heads - heads.num_signal_heads
    return MeasuredArm(
        name=arm.name,
        told=arm.spec.told,
        text=arm.text,
        context_length=arm.recipe.context_length,
        attention="grouped differential" if noise else "standard",
        hidden=sizes.hidden,
        ffn=sizes.ffn,
        layers=sizes.num_layers,
        head_dim=sizes.head_dim,
        signal_heads=heads.num_signal_heads,
        noise_heads=noise,
        kv_heads=heads.num_kv_groups * heads.value_heads,
        parameters=arm.parameters,
        tokens=arm.tokens,
        flops=float(arm.flops),
        learning_rate=rate,
        grown_from=arm.spec.grown_from,
        growth=None if growth is None else {"at": growth.at, "expand": growth.expand.as_dict(),
                           "moments": growth.moments,
                           "schedule": growth.schedule, "rewarm_up": growth.rewarm_up,
                           "multipliers": arm.recipe.multipliers},
    )  # fmt: skip


def _measured_run(arm: str, seed: int, job: Job, jobs: Mapping[tuple[str, int], Job]) -> Run:
    lines, per_step = lines_of(job), job.recipe.batch_size * job.recipe.context_length
    loss = final_loss(job)
    assert loss is not None  # a run that diverged is never done
    source = next((other for other in jobs.values() if other.directory == job.forked_from), None)
    own = [line for line in lines if line["step"] > job.fork_at]
    return Run(
        arm=arm,
        seed=seed,
        loss=loss,
        curve=tuple((line["step"] * per_step, line["eval_loss"]) for line in lines if "eval_loss" in line),
        seconds=sum(_seconds(own, per_step, job.fork_at)),
        growth=None if source is None else _growth(lines, lines_of(source), job.fork_at),
        maps=_maps(job, per_step),
    )


def _seconds(lines: Sequence[Mapping[str, Any]], per_step: int, begin: int) -> list[float]:
    """Of the steps between two lines each."""
    found = []
    for line in lines:
        if "tokens_per_second" in line:
            found.append((line["step"] - begin) * per_step / line["tokens_per_second"])
            begin = line["step"]
    return found


def _growth(lines: Sequence[Mapping[str, Any]], source: Sequence[Mapping[str, Any]], at: int) -> dict[str, float]:
    grown = next(index for index, line in enumerate(lines) if line.get("event") == GROWTH)
    found: dict[str, float] = {}
    for key, part in (("before", lines[:grown]), ("after", lines[grown:])):
        at_growth = [line["eval_loss"] for line in part if "eval_loss" in line and line["step"] == at]
        if at_growth:
            found[key] = at_growth[-1]
    means = [[line["loss"] for line in part if "loss" in line and at < line["step"] <= at + _TRANSIENT_STEPS]
             for part in (lines[grown:], source)]  # fmt: skip
    if all(means) and len(means[0]) == len(means[1]):
        found["transient"] = fmean(means[0]) - fmean(means[1])
    copies = [line["copies"] for line in lines if line.get("event") == HEALTH and "copies" in line]
    if copies:
        found["copy_cosine"] = fmean(axis["cosine"] for axis in copies[-1].values())
    return found


def _maps(job: Job, per_step: int) -> tuple[Maps, ...]:
    path = job.directory / MAPS_FILE
    if not job.map_every or not path.exists():
        return ()
    return tuple(Maps(entry["step"] * per_step, tuple(entry["layers"])) for entry in json.loads(path.read_bytes()))
