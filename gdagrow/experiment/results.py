"""What an experiment measured, as `results.json` keeps it: everything that its tables and plots are made of."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from pydantic import ConfigDict, TypeAdapter, ValidationError

from gdagrow.errors import CheckpointError, ReportError
from gdagrow.formats.atomic_file import write_whole
from gdagrow.formats.strict_json import parse_object

RESULTS_FILE: Final = "results.json"

# What `Maps`, a run's growth and `planned` may hold.
MAP_FIGURES: Final = (
    "signal_entropy", "noise_entropy", "difference_entropy",
    "signal_top_5_percent", "noise_top_5_percent", "difference_top_5_percent", "difference_negative", "lambda",
)  # fmt: skip
GROWTH_FIGURES: Final = ("before", "after", "transient", "copy_cosine")
PLANNED_FIGURES: Final = ("sd", "detectable")


class _Strict:
    """Read by pydantic without conversions, unknown keys and numbers that are not finite refused."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Text(_Strict):
    """A text that arms are trained on.

    name: What arms call it.
    description: Where it comes from, in words.
    documents, tokens: How many, for training and held out.
    bigram: Loss of a bigram model of the training part on what is held out, in nats per byte.
    gzip: Size of what is held out under gzip -9, in nats per byte.
    """

    name: str
    description: str
    documents: tuple[int, int]
    tokens: tuple[int, int]
    bigram: float
    gzip: float


@dataclass(frozen=True)
class Arm(_Strict):
    """One of the things that are compared: a model, or a growth, with how it is trained.

    name: Its key in the recipe. told: Its label for people.
    text: The name of a `Text`. context_length: Tokens of a sequence.
    attention: `grouped differential`, `standard`...
    hidden, ffn, layers, head_dim, signal_heads, noise_heads, kv_heads: Sizes at the end; heads are those of a layer,
        and standard attention has no noise heads.
    parameters: At the end.
    tokens: All that it was trained on, those of its source included.
    flops: Of that training: three times those of the forward pass.
    learning_rate: The peak.
    grown_from: The arm whose state it was grown from, or None.
    growth: The fields of that growth, or None.
    """

    name: str
    told: str
    text: str
    context_length: int
    attention: str
    hidden: int
    ffn: int
    layers: int
    head_dim: int
    signal_heads: int
    noise_heads: int
    kv_heads: int
    parameters: int
    tokens: int
    flops: float
    learning_rate: float
    grown_from: str | None
    growth: Mapping[str, Any] | None


@dataclass(frozen=True)
class Maps(_Strict):
    """Attention maps of a run after `tokens` tokens: for each layer `MAP_FIGURES`, as means over its heads.

    Standard attention has no noise maps.
    """

    tokens: int
    layers: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class Run(_Strict):
    """An arm trained with one seed; runs of equal seeds saw the same data in the same order.

    loss: At the end, on what is held out, in nats per byte.
    curve: (tokens trained on, held-out loss); a growth has two points at the same tokens, before and after.
    seconds: Wall time on one thread.
    growth: Held-out loss `before` and `after` the growth; `transient`, the mean training loss of the first 20 steps
        after it minus that of the same steps of the arm it was grown from; `copy_cosine`, how alike copies are at the
        end. Any of them may be absent.
    maps: In the order of tokens; empty if they were not looked at.
    """

    arm: str
    seed: int
    loss: float
    curve: tuple[tuple[int, float], ...]
    seconds: float
    growth: Mapping[str, float] | None
    maps: tuple[Maps, ...]


@dataclass(frozen=True)
class Comparison(_Strict):
    """Arms against one of them, paired by seed.

    told: In words. matched: What is equal: `query heads`, `parameters`, `tokens`, `training FLOPs`.
    reference: The arm whose loss is subtracted. arms: The others.
    """

    told: str
    matched: str
    reference: str
    arms: tuple[str, ...]


@dataclass(frozen=True)
class Results(_Strict):
    """An experiment, whole or as far as it has come.

    experiment: Its name. title, question: In words. scale: Which of the recipe's sizes.
    command: That ran it. versions: Of what it was run with, by package. recipe: As it was read, plain JSON values.
    seeds: Those planned for every arm.
    planned: What was stated in advance: `sd`, the paired standard deviation of a pilot, and `detectable`, the
        difference that is then seen with 80% power. May be empty.
    tuning: For each arm that was tuned, the held-out loss of a short run by its peak learning rate, as text.
    runs: Those that are done, by arm and then by seed.
    """

    experiment: str
    title: str
    question: str
    scale: str
    command: str
    versions: Mapping[str, str]
    recipe: Mapping[str, Any]
    seeds: tuple[int, ...]
    planned: Mapping[str, float]
    texts: tuple[Text, ...]
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    tuning: Mapping[str, Mapping[str, float]]
    runs: tuple[Run, ...]

    @property
    def num_planned(self) -> int:
        """Runs when all is done."""
        return len(self.arms) * len(self.seeds)

    @property
    def complete(self) -> bool:
        """Whether every arm has every seed."""
        return len(self.runs) == self.num_planned

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def runs_of(self, arm: str) -> tuple[Run, ...]:
        """The runs of an arm that are done, by seed."""
        return tuple(sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed))


def write_results(results: Results, path: Path) -> None:
    """Write results as JSON, equal results as equal bytes; a file that is there is replaced when all is written.

    Raises:
        ReportError: they contradict themselves, or hold a number that is not finite.
        OutputError: the file cannot be written.
    """
    _require_consistent(results, str(path))
    try:
        text = json.dumps(asdict(results), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise ReportError(f"{path}: results that JSON cannot hold ({error}); look at the run they come from") from None
    write_whole(path, f"{text}\n".encode(), replace=True)


def read_results(path: Path) -> Results:
    """Read what `write_results` wrote, every number bit for bit as it was.

    Raises:
        ReportError: the file cannot be read, or is something else: every field that is wrong, in one sentence.
    """
    try:
        raw = path.read_bytes()
        parse_object(raw, str(path))  # duplicate keys, which pydantic would let pass
        results = TypeAdapter(Results).validate_json(raw)
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror}); give the results.json of an experiment") from None
    except CheckpointError as error:
        raise ReportError(str(error)) from None
    except ValidationError as error:
        told = "; ".join(_told(item) for item in error.errors(include_url=False))
        raise ReportError(f"{path}: not the results of an experiment: {told}; run the experiment again") from None
    _require_consistent(results, str(path))
    return results


def _told(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "unexpected_keyword_argument":
        return f"unknown key {where}"
    if item["type"] in ("missing", "missing_argument"):
        return f"{where} is missing"
    found = json.dumps(item["input"], default=repr)
    return f"{where}: {item['msg'][0].lower()}{item['msg'][1:]}, got {found if len(found) < 60 else found[:57] + '...'}"


def _require_consistent(results: Results, where: str) -> None:
    if problems := list(_contradictions(results)):
        raise ReportError(f"{where}: results that contradict themselves: {'; '.join(problems)}; run it again")


def _contradictions(results: Results) -> Iterator[str]:
    arms, texts = {arm.name for arm in results.arms}, {text.name for text in results.texts}
    yield from _repeated("arm", (arm.name for arm in results.arms))
    yield from _repeated("text", (text.name for text in results.texts))
    yield from _repeated("seed", results.seeds)
    yield from _repeated("run", (f"{run.arm} with seed {run.seed}" for run in results.runs))
    yield from _unknown("planned", "figure", results.planned, PLANNED_FIGURES)
    for arm in results.arms:
        yield from _unknown(f"arm {arm.name}", "text", [arm.text], texts)
        yield from _unknown(f"arm {arm.name}", "arm", [arm.grown_from] if arm.grown_from is not None else [], arms)
    for number, comparison in enumerate(results.comparisons, 1):
        compared = (comparison.reference, *comparison.arms)
        yield from _unknown(f"comparison {number}", "arm", compared, arms)
        yield from (f"comparison {number}: {again}" for again in _repeated("arm", compared))
    yield from _unknown("tuning", "arm", results.tuning, arms)
    for arm_name, losses in results.tuning.items():
        yield from (f"tuning of {arm_name}: {rate!r} is no learning rate" for rate in losses if not _is_rate(rate))
    for run in results.runs:
        yield from _of_run(run, arms, results.seeds)


def _of_run(run: Run, arms: Iterable[str], seeds: Iterable[int]) -> Iterator[str]:
    where = f"run {run.arm} with seed {run.seed}"
    yield from _unknown(where, "arm", [run.arm], arms)
    yield from _unknown(where, "seed", [run.seed], seeds)
    yield from _unknown(where, "figure of growth", run.growth or (), GROWTH_FIGURES)
    found = {key: None for maps in run.maps for layer in maps.layers for key in layer}
    yield from _unknown(where, "figure of maps", found, MAP_FIGURES)
    if len({frozenset(layer) for maps in run.maps for layer in maps.layers}) > 1:
        yield f"{where}: maps whose layers have different figures"
    if not all(maps.layers for maps in run.maps):
        yield f"{where}: maps of no layer"


def _unknown(where: str, kind: str, found: Iterable[object], known: Iterable[object]) -> Iterator[str]:
    known = set(known)
    yield from (f"{where}: unknown {kind} {name}" for name in found if name not in known)


def _repeated(kind: str, names: Iterable[object]) -> Iterator[str]:
    yield from (f"{kind} {name} twice" for name, count in Counter(names).items() if count > 1)


def _is_rate(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
