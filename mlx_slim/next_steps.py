"""What one would type next, with the paths that a command was given, quoted for a shell.

Invariant: the same commands stand at the end of a command and on the page of its run. Nothing heavy
is imported. Try it: ``mlx-slim train smollm2-lora -o runs/try``.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

YOUR_ROWS = "your-rows.jsonl"
YOUR_TASK = "your-task.yaml"  # docs/scoring.md says what it holds
GENERAL_TASK = "openbookqa"  # of a model that was trained on no task in particular


@dataclass(frozen=True)
class NextStep:
    """A command worth typing next.

    Attributes:
        why: What it does, a verb first.
        command: As it is typed.
    """

    why: str
    command: str


def step(why: str, *words: object) -> NextStep:
    """Return a step whose command is ``words``, quoted."""
    return NextStep(why, " ".join(_quoted(str(word)) for word in words))


def _quoted(word: str) -> str:
    """Return a word as a shell reads it; what a terminal would obey as escapes (bash, zsh)."""
    if word.isprintable():
        return shlex.quote(word)
    plain = {ord(c): f"\\{c}" for c in "\\'"}
    escaped = (
        c.translate(plain)
        if c.isprintable()
        else "".join(f"\\x{byte:02x}" for byte in c.encode(errors="surrogateescape"))
        for c in word
    )
    return f"$'{''.join(escaped)}'"


def look_at(page: Path) -> NextStep:
    """Return how to open a page in the browser."""
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    return step("look at its page", opener, page)


def train_on(model: str | Path, recipe: str = "smollm2-lora") -> NextStep:
    """Return how to train a model on rows of one's own."""
    words = [f"model={model}", "revision=null", f"data.path={YOUR_ROWS}", "-o", "runs/mine"]
    return step("train it on your rows", "mlx-slim", "train", recipe, *words)


def score(
    model: str | Path, adapters: Sequence[str | Path] = (), *, out: str, task: str = GENERAL_TASK
) -> NextStep:
    """Return how to score a model on ``task`` into the folder ``out``."""
    on = [word for adapter in adapters for word in ("--adapter", adapter)]
    words = ["mlx-slim", "eval", model, *on, "--task", task, "--limit", 100, "-o", out]
    return step("score it on your task" if task == YOUR_TASK else "score it", *words)


def use_model(
    model: str | Path,
    adapters: Sequence[str | Path] = (),
    *,
    name: str | Path = "",
    task: str = GENERAL_TASK,
) -> list[NextStep]:
    """Return what one does with a model and the adapters on it: talk, score, send to Ollama.

    Args:
        model: Hub id or folder.
        adapters: Folders (``DIR`` or ``DIR=WEIGHT``).
        name: New folders beside it begin so; the model's path by default.
        task: Names or file of the tasks that it is scored on.
    """
    on = [word for adapter in adapters for word in ("--adapter", adapter)]
    name = name or (model if Path(model).exists() else Path(model).name)
    steps = [
        step("talk with it", "mlx-slim", "chat", model, *on),
        score(model, adapters, out=f"{name}-scores", task=task),
    ]
    source: str | Path = model
    if adapters:
        source = f"{name}-fused"
        steps.append(step("merge it", "mlx-slim", "fuse", model, *on, "-o", source))
    to = ("--to", "ollama", "-o", f"{name}-ollama")
    return [*steps, step("for Ollama", "mlx-slim", "export", source, *to)]


def after_run(
    out: Path,
    command: str,
    recipe: str,
    model: str,
    artifact: str,
    on: Sequence[str] = (),
    base: str | None = None,
    task: str = GENERAL_TASK,
) -> list[NextStep]:
    """Return what one does with a complete run.

    Args:
        out: The run folder.
        command: ``train`` or ``distill``.
        recipe: Its name or file.
        model: The base.
        artifact: ``adapters`` or ``model``, inside the folder.
        on: Adapters below the new one.
        base: Folder inside of a base that the run quantized, or None.
        task: Names or file of the tasks that concern what it was trained on.
    """
    tuned = out / artifact
    adapted = (tuned / "adapter_config.json").exists()
    if adapted:
        steps = use_model(out / base if base else model, [*on, tuned], name=out, task=task)
    else:
        steps = use_model(tuned, name=out, task=task)
    yours = step(
        "your own rows",
        *("mlx-slim", command, recipe, f"data.path={YOUR_ROWS}", "-o", out.with_name("yours")),
    )
    return [look_at(out / "report.html"), *steps, yours]
