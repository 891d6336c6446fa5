"""Every file operation of the shared primitives, each killed; run as a program, with light imports.

``python -m tests.support.primitives FOLDER`` prints one line a primitive: its name and how many
moments were tried. A moment that does not end as the undisturbed one is an exception.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mlx_slim import interrupts, locks
from mlx_slim.artifacts import atomic_file, atomic_folder, remove_folder, write_json
from mlx_slim.claims import makes_folder
from mlx_slim.errors import Complete
from mlx_slim.events import Notice, Saved, Started
from mlx_slim.run_dir import LOCK_FILE, RunDir, RunKind
from mlx_slim.training.metrics import MetricsFile
from mlx_slim.training.rotation import latest, path_of, rotate
from tests.support.kills import Watch, contents, run_forked

RUN = RunKind("try", "run", "state.json", ("tokens", "metrics.jsonl"))


def file_replaced(folder: Path) -> None:
    """An atomic file over an older one."""
    if not (folder / "deep" / "a.json").exists():
        write_json(folder / "deep" / "a.json", "old")
    with atomic_file(folder / "deep" / "a.json") as temporary:
        temporary.write_text("new " * 2000)


def folder_created(folder: Path) -> None:
    """An atomic folder under a new parent, made by a command that says when it is complete."""

    @makes_folder("try")
    def work(source: str, out: Path) -> None:
        with atomic_folder(out) as temporary:
            write_json(temporary / "a.json", source)
            with atomic_folder(temporary / "inner") as inner:
                (inner / "b.safetensors").write_text("b")

    try:
        work("source", folder / "deep" / "out")
    except Complete:
        assert (folder / "deep" / "out" / "inner" / "b.safetensors").exists()


def folder_replaced(folder: Path) -> None:
    """An atomic folder over an older one; at every moment one of the two can be got."""
    for text in ("old", "new"):
        with atomic_folder(folder / "out", replace=True) as temporary:
            for name in ("a", "b"):
                (temporary / name).write_text(text)


def folder_removed(folder: Path) -> None:
    """A folder that goes in one step."""
    if not (folder / "mark").exists():
        with atomic_folder(folder / "out", replace=True) as temporary:
            for name in ("state.json", "a", "b"):
                (temporary / name).write_text(name)
        (folder / "mark").touch()
    remove_folder(folder / "out", ("state.json", "a", "b"))
    locks.remove_dead(folder)


def run_claimed(folder: Path) -> None:
    """A run folder with rows before its state file, and work after it."""
    out = folder / "deep" / "run"
    with RunDir(out, RUN).claim(resume=True) as claim:
        if not claim.started:
            with atomic_folder(out / "tokens", replace=True) as temporary:
                (temporary / "ids.bin").write_text("ids")
            with (out / "metrics.jsonl").open("a") as handle:
                handle.write("line\n")
            write_json(out / "state.json", {})
        write_json(out / "run.json", {})


def run_claimed_anew(folder: Path) -> None:
    """The same without ``resume``: only a folder without a state can be started again."""
    out = folder / "run"
    with RunDir(out, RUN).claim(resume=(out / "state.json").exists()):
        (out / "tokens").mkdir(exist_ok=True)
        (out / "tokens" / "ids.bin").write_text("ids")
        write_json(out / "state.json", {})


def run_refused(folder: Path) -> None:
    """A run that cannot start, and after it one that can; no word of ``resume``."""
    out = folder / "deep" / "run"
    try:
        with RunDir(out, RUN).claim(resume=(out / "state.json").exists()) as claim:
            if not claim.started:
                (out / "tokens").mkdir()
                (out / "metrics.jsonl").touch()
                raise ValueError
    except ValueError:
        assert not out.exists() or not [*out.iterdir()]
    with RunDir(out, RUN).claim(resume=(out / "state.json").exists()):
        write_json(out / "state.json", {})


def checkpoints_rotated(folder: Path) -> None:
    """Steps with a line each, a checkpoint and a rotation after every second one, and resumes."""
    (folder / "run").mkdir(exist_ok=True)
    checkpoints = folder / "run" / "checkpoints"
    metrics = MetricsFile(folder / "run" / "metrics.jsonl")
    locks.remove_dead(folder / "run")
    newest = latest(checkpoints)
    step = 0
    if newest is None:
        metrics.clear()
    metrics.notify(Notice("about the run"))
    if newest is not None:
        step = json.loads((newest / "state.json").read_text())["step"]
        metrics.rewind(Saved(step, f"checkpoints/{newest.name}"))
        rotate(checkpoints, 2, {2})
    metrics.notify(Started(8, 1.0, 0, first_step=step))
    for number in range(step + 1, 9):
        metrics.notify(_Step(number))
        if number % 2 == 0:
            with atomic_folder(path_of(checkpoints, number), replace=True) as temporary:
                (temporary / "weights.safetensors").write_text("w" * number)
                write_json(temporary / "state.json", {"step": number})
            rotate(checkpoints, 2, {2})
            metrics.notify(Saved(number, f"checkpoints/step-{number}"))
    write_json(folder / "run" / "run.json", {})


class _Step(Notice):
    def __init__(self, step: int) -> None:
        super().__init__("")
        object.__setattr__(self, "step", step)

    def as_record(self) -> dict:
        return {"event": "step", "step": self.step}  # type: ignore[attr-defined]


PRIMITIVES = (
    file_replaced,
    folder_created,
    folder_replaced,
    folder_removed,
    run_claimed,
    run_claimed_anew,
    run_refused,
    checkpoints_rotated,
)


def _stopped(work: Callable[[Path], None], folder: Path, moment: int) -> None:
    with interrupts.raise_on_signal():
        try:
            Watch([folder], moment, signal.SIGTERM)
            work(folder)
        except KeyboardInterrupt:
            os._exit(130)


def every_moment(work: Callable[[Path], None], base: Path) -> int:
    """Kill ``work`` before each of its operations, let it go on; return how many there are.

    The second process is killed too, at half as late a moment, before a third one goes on. SIGTERM
    at the same moment leaves no temporary.
    """
    whole = base / "whole"
    whole.mkdir(parents=True)
    assert run_forked(lambda: work(whole)) == 0
    expected = contents(whole)
    assert not [name for name in expected if locks.TAG in name or LOCK_FILE in name], expected
    moment = 0
    while True:
        folder = base / str(moment)
        folder.mkdir()

        def killed(limit: int, folder: Path = folder) -> int:
            def run() -> None:
                Watch([folder], limit)
                work(folder)

            return run_forked(run)

        code = killed(moment)
        assert code in (0, -9), f"{work.__name__}: moment {moment}: exit code {code}"
        if code == 0:
            assert contents(folder) == expected
            return moment
        stopped = base / f"{moment}-stopped"
        stopped.mkdir()
        assert run_forked(partial(_stopped, work, stopped, moment)) in (0, 130), work.__name__
        left = [name for name in contents(stopped) if locks.TAG in name or LOCK_FILE in name]
        assert not left, f"{work.__name__}: SIGTERM at moment {moment} leaves {left}"
        assert run_forked(partial(work, stopped)) == 0, f"{work.__name__}: stopped at {moment}"
        assert contents(stopped) == expected, f"{work.__name__}: stopped at {moment}"
        if moment % 2:
            killed(moment // 2)
        assert run_forked(partial(work, folder)) == 0, (
            f"{work.__name__}: moment {moment} does not go on"
        )
        actual = contents(folder)
        assert actual == expected, (
            f"{work.__name__}: moment {moment}: {sorted(actual.items() ^ expected.items())}"
        )
        moment += 1


def main(folder: Path) -> None:
    """Go through all of them; say which heavy packages were imported."""
    heavy = {"mlx", "mlx_lm", "numpy", "transformers"} & {
        name.split(".")[0] for name in sys.modules
    }
    print(f"heavy {sorted(heavy)}")
    for work in PRIMITIVES:
        print(work.__name__, every_moment(work, folder / work.__name__), flush=True)


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # a kill loses nothing that was written
    main(Path(sys.argv[1]))
