"""The folder of a fine-tune: who may start in it, who may go on, and what it says at the end.

Invariant: a folder that cannot start a run is left as it was; a resume needs the same recipe (and,
in ``data/prepare.py``, the same rows); ``run.json`` means complete. Files: ``recipe.json`` (at the
start), ``metrics.jsonl``, ``tokens/``, ``data_ledger.json``, ``checkpoints/``, then ``adapters/``
(and ``base/``, if the run quantized it) or ``model/``, then ``run.json``.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlx_slim import events
from mlx_slim.artifacts import SCHEMA_VERSION, check_writable, first_missing, read_json
from mlx_slim.config.load import Resolved
from mlx_slim.config.schema import Recipe
from mlx_slim.data.prepare import Prepared
from mlx_slim.errors import SlimError
from mlx_slim.runtime import human_bytes, human_seconds, world

STATE_FILE = "recipe.json"
# Changing these on a resume cannot change the trajectory.
_FREE_ON_RESUME = ("memory", "report_to", "train.log_every", "train.save_every", "train.keep")


@dataclass(frozen=True)
class Result:
    """How a fine-tune ended.

    Attributes:
        out: The run folder.
        done: The loop's last event.
        model: Hub id or folder of the base.
        artifact: ``adapters`` or ``model`` inside the run folder.
        trainable: Trainable parameters.
        total: All parameters (of the dense model).
        predicted_peak_bytes: What the planner said.
        ledger: Rows given, used, cut and dropped.
        on: Adapters that lie under the new one.
        base: Folder inside the run folder of the base that the run quantized; None if it did not.
    """

    out: Path
    done: events.Done
    model: str
    artifact: str
    trainable: int
    total: int
    predicted_peak_bytes: int
    ledger: dict[str, Any]
    on: list[str] = field(default_factory=list)
    base: str | None = None


def claim(out: Path, recipe: Recipe, resume: bool) -> bool:
    """Return whether ``out`` holds a run that was started; refuse what would lose or mix runs."""
    if out.exists() and not out.is_dir():
        raise SlimError(f"{out} is a file", "choose a folder for the run")
    check_writable(out)
    state = out / STATE_FILE
    if not out.exists() or not any(out.iterdir()):
        if resume:
            raise SlimError(f"{out} holds no run to resume", "start it without --resume")
        return False
    if not state.exists():
        raise SlimError(f"{out} is not empty and holds no run", "choose another output folder")
    if not resume:
        raise SlimError(
            f"{out} holds a run already", "go on with --resume, or choose another output folder"
        )
    different = _differences(_completed(read_json(state)["recipe"]), recipe.model_dump(mode="json"))
    if different:
        raise SlimError(
            f"{out} was started with another recipe: {'; '.join(different)}",
            "resume with the same values, or start a new run",
        )
    return True


def _completed(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of a run with the keys that its version did not have.

    They get their defaults, except where that version computed otherwise: 0.1 decayed every
    parameter, and gave Muon's fallback the learning rate of Muon.
    """
    train = dict(recipe["train"])
    if train["weight_decay"] > 0:
        train.setdefault("decay_all", True)
    if train["optimizer"] == "muon":
        train.setdefault("fallback_learning_rate", train["learning_rate"])
    with contextlib.suppress(ValidationError):  # a key that is no more: the comparison names it
        return Recipe.model_validate({**recipe, "train": train}).model_dump(mode="json")
    return {**recipe, "train": train}


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return ``key: old → new`` for each value that a resume may not change."""
    lines: list[str] = []
    for key in sorted(set(old) | set(new)):
        path = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if before == after or path in _FREE_ON_RESUME:
            continue
        if isinstance(before, dict) and isinstance(after, dict) and prefix == "":
            lines += _differences(before, after, f"{path}.")
        else:
            lines.append(f"{path}: {before!r} → {after!r}")
    return lines


@contextlib.contextmanager
def fresh(out: Path, *, keep: bool) -> Iterator[None]:
    """Remove a folder that this run created if it cannot start; one that has a state stays."""
    made = first_missing(out)
    try:
        yield
    except BaseException:
        if not keep and not (out / STATE_FILE).exists() and world().rank() == 0:
            for path in out.glob("*") if made is None else [made]:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        path.unlink()
        raise


def state_record(resolved: Resolved, data: Prepared | None) -> dict[str, Any]:
    """Return ``recipe.json``: what a resume must match; ``data`` is None before there are rows."""
    return {
        "schema_version": SCHEMA_VERSION,
        "name": resolved.name,
        "recipe": resolved.recipe.model_dump(mode="json"),
        "origins": resolved.origins,
        "data": None if data is None else data.fingerprint,
    }


def resume_command(resolved: Resolved, out: Path) -> str:
    """Return the command that goes on with a run, with the overrides that it was started with."""
    command = "train" if resolved.recipe.distill is None else "distill"
    words = ["mlx-slim", command, resolved.given]
    for key, origin in resolved.origins.items():
        if origin == "command line":
            value: Any = resolved.recipe.model_dump(mode="json", exclude_unset=True)
            for part in key.split("."):
                value = value[part]
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            words.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    return shlex.join([*words, "-o", str(out), "--resume"])


def summary_rows(result: Result) -> dict[str, str]:
    """Return the closing summary as name -> text."""
    done, totals = result.done, result.ledger["totals"]
    rows = {
        "rows": f"{totals['rows_used']:,} used of {totals['rows_given']:,} given"
        f" ({totals['rows_dropped']:,} dropped, {totals['rows_truncated']:,} cut)",
        "steps": f"{done.step:,} ({done.reason.replace('_', ' ')})",
        "tokens": f"{done.tokens:,} at {done.tokens / max(done.seconds, 1e-9):,.0f} tokens/s",
        "time": human_seconds(done.seconds),
        "trained": f"{result.trainable:,} of {result.total:,} parameters "
        f"({result.trainable / result.total:.2%})",
        "peak memory": f"{human_bytes(done.peak_memory_bytes)} measured, "
        f"{human_bytes(result.predicted_peak_bytes)} predicted",
        "saved": f"{result.out / result.artifact} (reloaded, same logits)",
        "try it": " ".join(
            ["mlx-slim generate", str(result.out / result.base) if result.base else result.model]
            + [f"--adapter {one}" for one in (*result.on, result.out / result.artifact)]
        )
        if (result.out / result.artifact / "adapter_config.json").exists()
        else f"mlx-slim generate {result.out / result.artifact}",
    }
    if (result.out / "second").is_dir():
        rows["second student"] = f"{result.out / 'second'} (reloaded, same logits)"
    if done.best_validation is not None:
        rows["best validation"] = f"{done.best_validation:.4f} nats/token at step {done.best_step}"
    return rows
