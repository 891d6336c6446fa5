"""Kill small runs of every command at a moment, go on, compare with the undisturbed.

Moments are the file operations, before each of which, and the events that a command reports, right
before its console hears of each.

Invariant: after a kill, ``--resume`` (or the same command, where there is none) ends with the bytes
of the run that was not killed, and leaves no name beside or inside the output that this one has
not. Every fourth moment is a SIGTERM instead: exit code 130, and no temporary is left. What may
differ is named in ``kills.comparable`` and nowhere else: times, sizes of memory. All imports happen
once; every run is a fork of this process, which itself computes nothing.

``python -m tests.support.kill_commands FOLDER`` kills at every moment of every command
(``make kills``; of ``slim``, which takes seconds, at every 31st); ``--points 24 --seed 0`` at so
many, drawn from all commands; ``--only NAME``; ``--every 5`` at every fifth of them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import mlx_slim  # noqa: F401  # first: it puts the fast BLAS under MLX
from mlx_slim import api, children, trackers  # noqa: F401  # imported once, for all runs
from mlx_slim.cli.main import COMMANDS, run
from mlx_slim.compare import cell, report, runner  # noqa: F401
from mlx_slim.errors import Interrupted
from mlx_slim.export import model as export  # noqa: F401
from mlx_slim.pruning import recover  # noqa: F401
from mlx_slim.sweeping import run as sweeping  # noqa: F401
from tests.support.kill_inputs import ALL, MATRIX, SPACE, TASK, TRAIN, Command
from tests.support.kills import (
    Watch,
    announce_events,
    comparable,
    contents,
    import_modules,
    name_modules,
    run_forked,
    temporaries,
)
from tests.support.runs import write_rows
from tests.support.tiny import fixed_answer_model, tiny_model

# ---------------------------------------------------------------------------------- one command


class Here:
    """Stands for the process of a cell or a trial: runs it here, so that a kill ends both."""

    stdin = None

    def __init__(self, command: list[str], **_: Any) -> None:
        self.words = command[command.index("mlx_slim") + 1 :]

    def poll(self) -> int:
        """Run it and return its exit code."""
        return run(self.words)


@dataclass
class Trial:
    """One command in a folder of its own.

    Attributes:
        name: Of the command.
        inputs: Folder of models and rows.
        work: Holds the output and nothing else; the same place for every run.
    """

    name: str
    inputs: Path
    work: Path
    expected: dict[str, Any] = field(default_factory=dict)
    moments: list[str] = field(default_factory=list)

    @property
    def command(self) -> Command:
        """What is run."""
        return ALL[self.name]

    @property
    def out(self) -> Path:
        """The output."""
        return self.work / "deep" / "out"

    def _run(self, resume: bool, limit: int | None, number: int, log: Path) -> None:
        os.chdir(self.inputs)
        os.fsync = lambda descriptor: None  # a kill loses nothing that was written
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ.pop("MLX_SLIM_DATA", None)  # slim scores its held-out text where it is
        with log.open("w") as handle:
            os.dup2(handle.fileno(), 1)
            os.dup2(handle.fileno(), 2)
        children.subprocess = type("processes", (), {"Popen": Here, "PIPE": None})  # type: ignore[assignment]
        watch = Watch([self.work], limit, number)
        announce_events(watch)
        words = [*self.command.words, "-o", str(self.out)]
        code = run([*words, "--resume"] if resume else words)
        sys.stdout.flush()
        sys.stderr.flush()
        if limit is None:
            (log.parent / "moments").write_text("\n".join(watch.seen))
            name_modules(log.parent / "modules")
        if code:
            os._exit(code)

    def _fork(self, resume: bool, limit: int | None = None, number: int = signal.SIGKILL) -> int:
        self.log = self.work.parent / "log"
        return run_forked(partial(self._run, resume, limit, number, self.log))

    def undisturbed(self) -> None:
        """Run once to the end, and keep what it made."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        code = self._fork(False)
        assert code == 0, f"{self.name}: exit code {code}\n{self.log.read_text()}"
        self.moments = (self.log.parent / "moments").read_text().splitlines()
        import_modules(self.log.parent / "modules")
        self.expected = self._contents()
        assert not temporaries(self.expected), f"{self.name}: {temporaries(self.expected)}"
        if not self.command.resumes:
            again = self._fork(False)
            told = self.log.read_text()
            assert again == 0 and "complete: nothing to do" in told, f"{self.name}: {told}"
            assert self._contents() == self.expected

    def _contents(self) -> dict[str, Any]:
        return {name: comparable(name, content) for name, content in contents(self.work).items()}

    def _resume(self, moment: int) -> bool:
        """Whether to say ``--resume``: always where it is needed, else every other time."""
        there = (self.out / self.command.state).exists()
        return self.command.resumes and (there or moment % 2 == 0)

    def killed_at(self, moment: int) -> str:
        """Kill at a moment and go on; return what was not as it should be, or nothing.

        Every fourth time it is stopped by SIGTERM, every third time what goes on is killed too.
        """
        shutil.rmtree(self.work)
        self.work.mkdir()
        if moment % 4 == 3:
            code = self._fork(False, moment, signal.SIGTERM)
            if code not in (0, Interrupted.exit_code):  # 0: all was done already
                return f"exit code {code} after SIGTERM: {self.log.read_text()[-2000:]}"
            if left := temporaries(contents(self.work)):
                return f"SIGTERM leaves {left}"
        elif (code := self._fork(False, moment)) != -9:
            return f"exit code {code} instead of a kill"
        if moment % 3 == 0:
            code = self._fork(self._resume(moment), moment // 2)
            if code not in (0, -9):
                return f"the second run ended with {code}: {self.log.read_text()[-2000:]}"
        code = self._fork(self._resume(moment))
        if code:
            return f"does not go on, exit code {code}: {self.log.read_text()[-2000:]}"
        actual = self._contents()
        names = sorted(set(actual) ^ set(self.expected))
        if names:
            return f"names that only one of the two has: {names}"
        other = [name for name in actual if actual[name] != self.expected[name]]
        return f"other contents: {[_shown(actual[n], self.expected[n], n) for n in other]}" * bool(
            other
        )


def _shown(actual: Any, expected: Any, name: str) -> str:
    if isinstance(actual, bytes):
        return name
    return f"{name}: {str(actual)[:1500]} instead of {str(expected)[:1500]}"


# ------------------------------------------------------------------------------------- the whole


def prepare(inputs: Path, names: list[str]) -> None:
    """Write models, rows, a task, a text, a recipe, a space and a matrix.

    Commands among ``names`` that read an adapter get one: it is tuned, and exported.
    """
    shutil.rmtree(inputs, ignore_errors=True)
    inputs.mkdir(parents=True)
    tiny_model(inputs / "source", seed=0)
    tiny_model(inputs / "other", seed=1)
    fixed_answer_model(inputs / "speaker", "By me!")
    write_rows(inputs / "rows.jsonl", 16)
    (inputs / "toytask.yaml").write_text(yaml.safe_dump(TASK, sort_keys=False))
    rows = [
        {"question": f"Number {i} is", "choices": ["odd", "even", "prime"], "answer": i % 3}
        for i in range(12)
    ]
    (inputs / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (inputs / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 12)
    (inputs / "small.yaml").write_text(yaml.safe_dump({"model": "source", **TRAIN}))
    (inputs / "space.yaml").write_text(yaml.safe_dump(SPACE, sort_keys=False))
    (inputs / "toy.yaml").write_text(yaml.safe_dump(MATRIX, sort_keys=False))
    os.chdir(inputs)
    if any(word.startswith(("tuned", "peft")) for name in names for word in ALL[name].words):
        assert run(["train", "small.yaml", "-o", "tuned", "--quiet"]) == 0
        assert run(["export", "tuned", "--to", "peft", "-o", "peft"]) == 0
    name_modules(inputs / "modules")


def trial(name: str, base: Path) -> Trial:
    """Return a command that was run undisturbed."""
    prepared = Trial(name, base / "given", base / name.replace(" ", "-") / "work")
    prepared.undisturbed()
    return prepared


def every_moment(names: list[str], base: Path, tell: Callable[[str], None], every: int) -> int:
    """Kill each command at every ``every``-th moment; return how many went wrong."""
    tell(f"{'command':20}    moments killed killed twice wrong seconds")
    wrong = 0
    for name in names:
        began = time.monotonic()
        one = trial(name, base)
        bad = 0
        moments = range(0, len(one.moments), every * one.command.every)
        for moment in moments:
            if trouble := one.killed_at(moment):
                bad += 1
                tell(f"{name}, at {moment} ({one.moments[moment]}): {trouble}")
        twice = sum(moment % 3 == 0 for moment in moments)
        seconds = time.monotonic() - began
        tell(
            f"{name:20} {len(one.moments):>10} {len(moments):>6} {twice:>12} {bad:>5} "
            f"{seconds:>7.0f}"
        )
        wrong += bad
    return wrong


def some_moments(names: list[str], points: int, seed: int, base: Path, tell: Any) -> int:
    """Kill at ``points`` moments, drawn with ``seed``, at least one of each command."""
    draw = random.Random(seed)
    chosen = [*names, *draw.choices(names, k=max(0, points - len(names)))][:points]
    wrong = 0
    for name in names:
        if not (count := chosen.count(name)):
            continue
        one = trial(name, base)
        for moment in draw.sample(range(len(one.moments)), count):
            trouble = one.killed_at(moment)
            tell(f"{name}, at {moment} ({one.moments[moment]}): {trouble or 'equal'}")
            wrong += bool(trouble)
    return wrong


def main(words: list[str]) -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--points", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL))
    arguments = parser.parse_args(words)
    for module, _ in COMMANDS.values():
        importlib.import_module(f"mlx_slim.cli.{module}")
    base = arguments.folder.resolve()
    assert run_forked(partial(prepare, base / "given", arguments.only)) == 0
    import_modules(base / "given" / "modules")
    tell = partial(print, flush=True)
    if arguments.points is None:
        return every_moment(arguments.only, base, tell, arguments.every)
    return some_moments(arguments.only, arguments.points, arguments.seed, base, tell)


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
