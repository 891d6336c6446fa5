"""Small fine-tunes for tests: rows, recipes, observers, and a process that kills itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_slim.config.load import Resolved, from_values
from mlx_slim.events import Event, StepDone
from mlx_slim.finetuning.run_dir import Result, steps_after

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def write_rows(path: Path, count: int = 24) -> Path:
    """Write ``count`` completion rows of different lengths."""
    rows = [
        {
            "prompt": f"{i}: {' '.join(WORDS[: 1 + i % 7])}",
            "completion": WORDS[i % 10] * (1 + i % 3),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(model: Path, data: Path, method: str = "lora", **train: Any) -> Resolved:
    """Return a recipe of ten small steps over two epochs."""
    values = {
        "model": str(model),
        "method": method,
        "adapter": {"dropout": 0.1},
        "quantize": {"group_size": 32},
        "data": {"path": str(data), "validation": 4},
        "report_answers": 0,  # half a second a run
        "train": {
            "steps": 10,
            "batch_tokens": 256,
            "max_length": 128,
            "save_every": 2,
            "validate_every": 4,
            "learning_rate": 1e-3,
            **train,
        },
    }
    return from_values(values, "small", "test")


class Recorder:
    """An observer that keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def notify(self, event: Event) -> None:
        self.events.append(event)


class CtrlC(Recorder):
    """Sends this process SIGINT after a step."""

    def __init__(self, step: int = 3) -> None:
        super().__init__()
        self._step = step

    def notify(self, event: Event) -> None:
        super().notify(event)
        if isinstance(event, StepDone) and event.step == self._step:
            os.kill(os.getpid(), signal.SIGINT)


def talk_command(result: Result) -> str:
    """Return the command that a run advertises to talk with what it made."""
    return next(
        one.command for one in steps_after(result, "train", "r") if one.why == "talk with it"
    )


def losses(run: Path) -> dict[int, float]:
    """Return step -> loss of a run's ``metrics.jsonl``; every step may stand there once."""
    by_step: dict[int, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["event"] == "step":
            assert record["step"] not in by_step
            by_step[record["step"]] = record["loss"]
    return by_step


KILL_SCRIPT = """
import os, signal, sys
from pathlib import Path
from mlx_slim.finetuning.run import finetune
from tests.support.runs import recipe

model, data, out, method, moment, count, resume = sys.argv[1:8]
count = int(count)

import mlx.core as mx

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Observer:
    def notify(self, event):
        if moment == "step" and getattr(event, "step", 0) == count and event.name == "step":
            die()

if moment == "save":
    write = mx.save_safetensors
    calls = []
    def save(path, *args, **kwargs):
        calls.append(path)
        write(path, *args, **kwargs)
        if len(calls) == count:
            with open(path, "r+b") as handle:
                handle.truncate(20)
            die()
    mx.save_safetensors = save
if moment == "base":  # a tensor of the quantized base is written, the next is not
    from mlx_slim.models.shards import Shards
    write_tensor = Shards.write
    names = []
    def write_some(self, name, value):
        if len(names) == count:
            die()
        names.append(name)
        write_tensor(self, name, value)
    Shards.write = write_some
small = recipe(Path(model), Path(data), method)
finetune(small, Path(out), observer=Observer(), resume=resume == "1")
"""


def run_script(script: str, *words: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a script with ``words`` as its arguments in a process of its own, or in several ranks."""
    command = [sys.executable, "-c", script, *map(str, words)]
    if ranks > 1:
        launch = "from mlx._distributed_utils.launch import main; main()"
        port = ["--starting-port", str(free_port())]
        start = [sys.executable, "-c", launch, "-n", str(ranks), "--backend", "ring", *port]
        command = [*start, "--", *command]
    root = Path(__file__).parents[2]
    return subprocess.run(
        command,
        cwd=root,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def run_until_killed(script: str, *words: object) -> None:
    """Run a script that kills itself."""
    done = run_script(script, *words)
    assert done.returncode == -signal.SIGKILL, done.stderr


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_and_kill(
    model: Path, data: Path, out: Path, method: str, moment: str, count: int, *, resume: bool
) -> None:
    """Run the small recipe in a process that kills itself at a moment.

    Args:
        model: Folder of the base.
        data: File of rows.
        out: Run folder.
        method: Of the recipe.
        moment: ``step`` (right after the event of step ``count``) or ``save`` (in the middle of
            the ``count``-th tensor file of a checkpoint).
        count: See ``moment``.
        resume: Go on with the run in ``out``.
    """
    arguments = [model, data, out, method, moment, count, int(resume)]
    run_until_killed(KILL_SCRIPT, *arguments)
