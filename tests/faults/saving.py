"""Faults at every call of what a training run saves, and `--resume` behind them; prints what was found as JSON.

    LD_PRELOAD=inject.so python -m tests.faults.saving DIRECTORY [--where state] [--faults kill,error] [--every 5]

One process trains a tiny model. Where it is about to save, it forks a process for each call of the saving and each
fault, looks at what that left, and puts the run's directory back; then it goes on. What was left is gone on with,
`--resume`, in further forks: once for all that look alike, or each of them.
"""

import argparse
import errno
import gc
import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from gdagrow_cli.main import main

import gdagrow.train.run as running
from gdagrow.train.engine import RunTrainer
from gdagrow.train.run_directory import MODEL, saving_directory, states
from tests.checkpoints import listing
from tests.faults.injector import KINDS, WRITES
from tests.faults.server import arm
from tests.trainings import CONFIG, lines, write_recipe

TEXT = "the quick brown fox jumps over the lazy dog; " * 20
# A step, a step and a growth, a step and a model: all that is saved, and states that are removed.
RUN = {
    "model": {"config": {**CONFIG, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                         "num_attention_heads": 4, "num_noise_heads": 1, "head_dim": 4}},
    "steps": 3, "save_every": 1, "keep": 1, "evaluate_every": 0, "context_length": 8, "batch_size": 2,
    "growth": [{"at": 2, "expand": {"ffn": 2}}],
}  # fmt: skip
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


class Sweep:
    """Faults in forks of a process that trains.

    Args:
        directory: Holds the run, the copies of it, and what forks say.
        where: At which saving: `state`, `growth`, `model`, and `restart`, which removes a run.
        faults: Which kinds: `kill`, `torn`, `error`, `stop`.
        every: Errors and requests to stop come at every so many calls; kills at each.
        resume_all: Keep what each fault left, and not only what looks different.
    """

    def __init__(self, directory: Path, where: set[str], faults: set[str], every: int, resume_all: bool) -> None:
        self.run, self._directory, self._where = directory / "run", directory, where
        self._faults, self._every, self._resume_all = faults, every, resume_all
        self._known: dict[str, dict[str, bytes | None]] = {}  # states and models, each by name, as they must be
        self.left: dict[tuple[str, ...], Path] = {}
        self.figures: dict[str, Counter[str]] = {}
        self._is_child = False

    def around(self, where: str, action: Callable[[], Any], *, loses_states: bool = False) -> Any:
        """Try an action with each fault in forks, then carry it out."""
        if where not in self._where:
            return action()
        before = self._directory / "before"
        shutil.copytree(self.run, before)
        self._learn(self.run)
        there = _states(self.run).keys()
        calls = self._calls(action)
        self._learn(self.run)
        counted = self.figures[where] = Counter(calls=len(calls))
        for fault in self._plan(calls):
            self._put_back(before)
            code, told = self._forked(action, fault)
            counted["faults"] += 1
            self._require_whole((where, calls[fault["at"] - 1], fault, code, told), loses_states)
            self._require_told((where, calls[fault["at"] - 1], fault), code, told)
            counted["whole"] += bool(_states(self.run).keys() - there)
            self._keep()
        self._put_back(before)
        shutil.rmtree(before)
        return action()

    def resume(self) -> int:
        """Go on with what was kept, in forks; each must come to the same run. Returns how many there were."""
        for look, kept in self.left.items():
            child = os.fork()
            if not child:
                os._exit(self.train(kept, "--resume"))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code == (2 if MODEL in look else 0), (look, code)  # nothing is left to do where there is a model
            assert not (differ := _differing(_content(kept), _content(self.run))), (look, differ)
            assert lines(kept) == lines(self.run), look
            shutil.rmtree(kept)
        return len(self.left)

    def train(self, run: Path, *flags: str) -> int:
        """Train in a directory; in the child of a fork this does not return."""
        code = main(["train", str(self._directory / "recipe.yaml"), "--out", str(run), "--quiet", *flags])
        if self._is_child:
            os._exit(code)
        return code

    def _plan(self, calls: list[str]) -> Iterator[dict[str, Any]]:
        for at, call in enumerate(calls, 1):
            if "kill" in self._faults:
                yield self._fault("before", at, signal.SIGKILL)
            if "torn" in self._faults and call.split()[0] in WRITES:
                yield self._fault("torn", at, signal.SIGKILL)
            if "error" in self._faults and at % self._every == 0:
                yield self._fault("error", at, ERRORS[at % 3])
            if "stop" in self._faults and at % self._every == 0:
                yield self._fault("before", at, (signal.SIGINT, signal.SIGTERM)[at % 2])

    def _fault(self, kind: str, at: int, value: int) -> dict[str, Any]:
        return {"under": str(self.run), "at": at, "kind": KINDS[kind], "value": int(value), "log": None}

    def _calls(self, action: Callable[[], Any]) -> list[str]:
        log = self._directory / "log"
        code, told = self._forked(action, {**self._fault("log", 0, 0), "log": str(log)})
        assert code == 0, told
        return log.read_text().splitlines()

    def _forked(self, action: Callable[[], Any], fault: dict[str, Any]) -> tuple[int, str]:
        told, state = self._directory / "told", random.getstate()
        child = os.fork()
        if not child:
            random.setstate(state)  # Python seeds it anew in a fork, and a run saves it
            self._is_child = True
            os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
            arm(fault)
            action()  # an error goes the way of all errors of a run, up to `train`
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told.read_text()

    def _learn(self, run: Path) -> None:
        for name, content in _states(run).items():
            assert self._known.setdefault(name, content) == content, name

    def _require_whole(self, what: object, loses_states: bool) -> None:
        found = _states(self.run)
        for name, content in found.items():
            assert not (differ := _differing(content, self._known[name])), (what, name, differ)
        assert loses_states or any(name != MODEL for name in found), what

    def _require_told(self, what: object, code: int, told: str) -> None:
        kind, value = what[2]["kind"], what[2]["value"]  # type: ignore[index]
        if value == signal.SIGKILL and kind != KINDS["error"]:
            assert code == -signal.SIGKILL, (what, code, told)
            return
        expected = 2 if kind == KINDS["error"] else 128 + value
        assert code in (0, expected), (what, code, told)
        if code == 2:
            assert told.count("\n") == 1, (what, told)
            # A writer of torch says that it failed, and not why.
            assert os.strerror(value) in told or "the disk took only a part of it" in told, (what, told)
            assert str(self.run) in told, (what, told)
        if code:
            assert not saving_directory(self.run).exists(), (what, self._names())

    def _names(self) -> list[str]:
        return sorted(os.listdir(self.run)) if self.run.exists() else []

    def _keep(self) -> None:
        saving = saving_directory(self.run)
        unfinished = sorted(os.listdir(saving)) if saving.exists() else []
        look = (*self._names(), *(f"{saving.name}/{name}" for name in unfinished))
        look = (*look, str(len(self.left))) if self._resume_all else look
        if look not in self.left:
            self.left[look] = self._directory / f"left-{len(self.left)}"
            shutil.copytree(self.run, self.left[look])

    def _put_back(self, before: Path) -> None:
        shutil.rmtree(self.run)
        shutil.copytree(before, self.run)


def _states(run: Path) -> dict[str, dict[str, bytes | None]]:
    """The content of states and models, by name."""
    found = [*(state.directory for state in states(run)), run / MODEL]
    return {path.name: listing(path) for path in found if path.exists()}


def _differing(one: dict[str, bytes | None], other: dict[str, bytes | None]) -> list[str]:
    return sorted(path for path in {*one, *other} if one.get(path, b"absent") != other.get(path, b"absent"))


def _content(run: Path) -> dict[str, bytes | None]:
    """Of two runs the pickle of the same optimizer differs if one was loaded meanwhile, and with it a recorded hash."""
    unlike = (running.METRICS_FILE, running.RECORD_FILE)
    return {path: content for path, content in listing(run).items() if not path.endswith(unlike)}


@contextmanager
def swept(sweep: Sweep) -> Iterator[None]:
    """Put a sweep around all that a run saves."""
    save, grow, model = RunTrainer._save_checkpoint, running._Run._grow, running._Run._publish_model

    def saved(self: RunTrainer, *given: Any) -> None:
        action = partial(save, self, *given)
        action() if self.state.global_step != 2 else sweep.around("state", action)

    RunTrainer._save_checkpoint = saved  # type: ignore[method-assign]
    running._Run._grow = lambda *given: sweep.around("growth", partial(grow, *given))  # type: ignore[method-assign]
    running._Run._publish_model = lambda *given: sweep.around("model", partial(model, *given))  # type: ignore
    try:
        yield
    finally:
        RunTrainer._save_checkpoint, running._Run._grow = save, grow  # type: ignore[method-assign]
        running._Run._publish_model = model  # type: ignore[method-assign]


@contextmanager
def restarted(sweep: Sweep) -> Iterator[None]:
    """Put a sweep around the removal of a run that is begun anew."""
    begin = running.begin
    running.begin = lambda *given, **how: sweep.around("restart", partial(begin, *given, **how), loses_states=True)
    try:
        yield
    finally:
        running.begin = begin


def report() -> None:
    """Carry out what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--where", default="state,growth,model,restart")
    parser.add_argument("--faults", default="kill,torn,error,stop")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--resume-all", action="store_true")
    options = parser.parse_args()
    (options.directory / "text.txt").write_text(TEXT)
    write_recipe(options.directory / "recipe.yaml", **RUN, data={"train": str(options.directory / "text.txt")})
    where, faults = (set(words.split(",")) for words in (options.where, options.faults))
    sweep = Sweep(options.directory, where, faults, options.every, options.resume_all)
    assert sweep.train(options.directory / "first") == 0  # imports all
    gc.collect()
    gc.freeze()  # the Trainer collects again and again
    with swept(sweep):
        assert sweep.train(sweep.run) == 0
    assert _content(sweep.run) == _content(options.directory / "first")
    resumed = sweep.resume()
    if "restart" in where:
        with restarted(sweep):
            assert sweep.train(sweep.run, "--restart") == 0
    print(json.dumps({"where": sweep.figures, "resumed": resumed}))


if __name__ == "__main__":
    report()
