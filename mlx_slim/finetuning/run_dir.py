"""The folder of a fine-tune: who may start or resume in it, and its result.

Invariant: a folder that cannot start a run is left as it was; a resume needs the same recipe, but
for more steps (and, in ``data/prepare.py``, the same rows); ``run.json`` means complete. Files:
``recipe.json`` (at the start; beside it ``recipe.yaml``, if the recipe was chosen),
``metrics.jsonl``, ``tokens/``, ``data_ledger.json``, ``checkpoints/``, then ``adapters/`` (and
``base/``, if the run quantized it) or ``model/``, then ``run.json``. A run that is given more steps
gets another ``recipe.json`` when it can start, and loses its ``run.json`` then; its adapters or
model stay until the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_slim import events
from mlx_slim.artifacts import SCHEMA_VERSION, write_json, write_text
from mlx_slim.config.aliases import RECIPE, rename
from mlx_slim.config.layers import COMMAND_LINE
from mlx_slim.data.ledger import LEDGER_FILE, RowTotals
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.examples import task_to_score
from mlx_slim.finetuning.reward_source import check_same_reward
from mlx_slim.next_steps import NextStep, after_run
from mlx_slim.reading import JsonObject, field, library_errors, read_object, short
from mlx_slim.run_dir import RunDir, RunKind
from mlx_slim.units import human_bytes, human_seconds

if TYPE_CHECKING:  # the page of a run is written without what trains one
    from mlx_slim.config.load import Resolved
    from mlx_slim.config.reward import RewardSource
    from mlx_slim.config.schema import Recipe
    from mlx_slim.config.train import TrainConfig
    from mlx_slim.data.prepare import Prepared
    from mlx_slim.training.optim import Extended

STATE_FILE, RECORD = "recipe.json", "run.json"
ANSWERS_FILE = "answers.json"
RECIPE_FILE = "recipe.yaml"  # of a run whose recipe was chosen, not read: to change and run again
RUN = RunKind(
    command="train",
    holds="run",
    state=STATE_FILE,
    before=(
        *("tokens", "data_ledger.json", "metrics.jsonl", "task_rows", "training_rows.json"),
        "alignment",
        RECIPE_FILE,
    ),
)
# Changing these on a resume cannot change the trajectory.
FREE_ON_RESUME = (
    "memory",
    "report_to",
    "report_answers",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.duty",
    "train.keep_awake",
    "train.shard",
)
_PLACES = ("distill.cache",)  # where a run looks for what it would compute
# These may grow: the run then takes more steps (``finetune.py``).
_LENGTH = ("train.steps", "train.epochs")


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
        predicted_peak_bytes: The planner's prediction.
        ledger: Rows given, used, cut and dropped.
        on: Adapters below the new one.
        base: Folder inside the run folder of the base that the run quantized; None if it did not.
    """

    out: Path
    done: events.Done
    model: str
    artifact: str
    trainable: int
    total: int
    predicted_peak_bytes: int
    ledger: JsonObject
    on: list[str] = dataclasses.field(default_factory=list)
    base: str | None = None


def read_result(out: Path) -> Result:
    """Return the result of the complete run in ``out``.

    Raises:
        SlimError: If it is not complete, or its record is damaged.
    """
    file, ledger = out / RECORD, out / LEDGER_FILE
    values = dict(read_object(file, result=dict)["result"])
    with library_errors(f"{short(file)} is damaged", "start a new run"):
        done = _done(values.pop("done"))
        return Result(out=out, done=done, ledger=read_object(ledger), **values)


def _done(record: JsonObject) -> events.Done:
    """Return the event of a ``run.json``; one of 0.1 had ``held_out_step``, no ``result_step``."""
    record = dict(record)
    if "held_out_step" in record:
        within, best = record.pop("held_out_step"), record.get("best_step")
        result = record.get("step") if best is None else best
        if record.get("reason") == "held_out":
            record["reason"] = "forgetting"
            result = min(result, within or 0)
        record.setdefault("result_step", result)
    return events.Done(**record)


def run_dir(out: Path) -> RunDir:
    """Return the folder of a fine-tune."""
    return RunDir(out, RUN)


@contextlib.contextmanager
def claim(
    out: Path,
    recipe: Recipe,
    observer: events.Observer,
    *,
    resume: bool,
    reward: RewardSource | None = None,
) -> Iterator[bool]:
    """Hold the folder ``out`` for a run; yield whether it was started before.

    Rank 0 holds it for all.

    Raises:
        SlimError: As ``RunDir.claim``, or if it was started with another recipe, or with another
            function than ``reward``.
    """
    with contextlib.ExitStack() as stack:
        notices: list[str] = []

        def match() -> None:
            notices.extend(_check_same(out, recipe))
            check_same_reward(out / STATE_FILE, reward)

        from mlx_slim.runtime import from_first_rank  # MLX: `report` needs none

        def hold() -> bool:
            claimed = stack.enter_context(run_dir(out).claim(resume=resume, match=match))
            if claimed.note:
                observer.notify(events.Notice(claimed.note))
            for notice in () if claimed.nested else notices:
                observer.notify(events.Notice(notice, "warning"))
            return claimed.started

        yield from_first_rank(hold)


def trained_as(file: Path) -> TrainConfig:
    """Return the ``train`` section of a run's ``recipe.json`` or ``run.json``."""
    from mlx_slim.config.train import TrainConfig

    with library_errors(f"{short(file)} is damaged", "start a new run"):
        return TrainConfig.model_validate(
            current_recipe(read_object(file, recipe=dict)["recipe"])["train"]
        )


def extended_run(out: Path) -> Extended | None:
    """Return how the run in ``out`` began, if it was given more steps since."""
    file = out / STATE_FILE
    extended = read_object(file).get("extended")
    if extended is None:
        return None
    with library_errors(f"{short(file)} is damaged", "start a new run"):
        from mlx_slim.training.optim import Extended

        return Extended(int(extended["warmup"]), tuple(int(total) for total in extended["totals"]))


def is_complete(out: Path, recipe: Recipe) -> bool:
    """Return whether the run in ``out`` is complete and as long as ``recipe`` says.

    A ``run.json`` of another length is that of the run before it was given more steps.
    """
    if not (out / RECORD).exists():
        return False
    extended = trained_as(out / RECORD)
    steps, epochs = recipe.train.steps, recipe.train.epochs
    return extended.steps == steps and (steps is not None or extended.epochs == epochs)


def fewer_steps(out: Path, before: str, after: str) -> SlimError:
    """Return the refusal of a resume that would end before the run did, or was to."""
    return SlimError(
        f"{out} is a run of {before}, {after} are fewer: a run cannot be shortened",
        "resume with as many or more, or start a new run",
    )


def _check_same(out: Path, recipe: Recipe) -> list[str]:
    """Refuse another recipe than the one in ``out``; return a notice for each old key in that one.

    Raises:
        SlimError: Names each difference.
    """
    file = out / STATE_FILE
    with library_errors(f"{short(file)} is damaged", "start a new run"):
        record = read_object(file, recipe=dict)
        _, notices = rename(record["recipe"], RECIPE, lambda _: short(file))
        started = current_recipe(record["recipe"])
        if "scale_with_ranks" not in record["recipe"]["train"]:  # then it scaled, on several ranks
            started["train"]["scale_with_ranks"] = recipe.train.scale_with_ranks
    different = _differences(started, recipe.model_dump(mode="json"))
    adapters = adapter_hashes(recipe)
    different += [
        f"{folder}: other contents"
        for folder, value in field(record, short(file), "adapters", dict, {}).items()
        if folder in adapters and adapters[folder] != value
    ]
    if different:
        raise SlimError(
            f"{out} was started with another recipe: {'; '.join(different)}",
            "resume with the same values, or start a new run",
        )
    old, new = started["train"], recipe.train
    if old["steps"] is not None and new.steps is not None and new.steps < old["steps"]:
        raise fewer_steps(out, f"{old['steps']:,} steps", f"train.steps={new.steps}")
    if old["steps"] is None and new.steps is None and new.epochs < old["epochs"]:
        raise fewer_steps(out, f"{old['epochs']:g} epochs", f"train.epochs={new.epochs:g}")
    return notices


def adapter_hashes(recipe: Recipe) -> dict[str, str]:
    """Return folder -> hash of the adapters that a run stacks on or starts from."""
    from mlx_slim.adapters.stack import parse_adapters
    from mlx_slim.adapters.store import adapter_hash
    from mlx_slim.finetuning.build import started_from

    below = [one.folder for one in parse_adapters(recipe.adapter.on)]
    return {str(folder): adapter_hash(folder) for folder in (*below, *started_from(recipe))}


def current_recipe(recipe: JsonObject) -> JsonObject:
    """Return the recipe of a run under today's keys, and with those that its version did not have.

    The latter get their defaults, except where that version computed otherwise: 0.1 decayed every
    parameter, and gave Muon's fallback the learning rate of Muon.
    """
    from pydantic import ValidationError

    from mlx_slim.config.schema import Recipe

    recipe, _ = rename(recipe, RECIPE)
    train = dict(recipe["train"])
    if train["weight_decay"] > 0:
        train.setdefault("decay_all", True)
    if train["optimizer"] == "muon":
        train.setdefault("fallback_learning_rate", train["learning_rate"])
    with contextlib.suppress(ValidationError):  # a key that is no more: the comparison names it
        return Recipe.model_validate({**recipe, "train": train}).model_dump(mode="json")
    return {**recipe, "train": train}


def _differences(old: JsonObject, new: JsonObject, prefix: str = "") -> list[str]:
    """Return ``key: old → new`` for each value that a resume may not change."""
    lines: list[str] = []
    for key in sorted(set(old) | set(new)):
        path = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if before == after or path in (*FREE_ON_RESUME, *_PLACES, *_LENGTH):
            continue
        if isinstance(before, dict) and isinstance(after, dict) and prefix == "":
            lines += _differences(before, after, f"{path}.")
        else:
            lines.append(f"{path}: {before!r} → {after!r}")
    return lines


def state_record(
    resolved: Resolved, data: Prepared | None, extended: Extended | None = None
) -> JsonObject:
    """Return ``recipe.json``: what a resume must match; ``data`` is None before there are rows."""
    return {
        "schema_version": SCHEMA_VERSION,
        "name": resolved.name,
        "given": resolved.source,
        "recipe": resolved.recipe.model_dump(mode="json"),
        "origins": resolved.origins,
        "data": None if data is None else data.fingerprint,
        **({"extended": asdict(extended)} if extended else {}),
        **({"reward": asdict(resolved.reward)} if resolved.reward else {}),
        **({"adapters": adapters} if (adapters := adapter_hashes(resolved.recipe)) else {}),
    }


def begin(out: Path, state: JsonObject | None, text: str) -> None:
    """Record in the folder ``out`` that a run can start, or that it takes more steps now.

    Args:
        out: The folder.
        state: ``recipe.json``; None leaves it.
        text: ``recipe.yaml``; empty for none.
    """
    if text:
        write_text(out / RECIPE_FILE, text)
    if state is not None:
        write_json(out / STATE_FILE, state)
    (out / RECORD).unlink(missing_ok=True)  # of the run that was shorter


def command_words(resolved: Resolved) -> list[str]:
    """Return the command that started a run, without its folder: for ``RunDir.resumable``."""
    words = ["train" if resolved.recipe.distill is None else "distill", resolved.source]
    for key, origin in resolved.origins.items():
        if origin == COMMAND_LINE:
            value: Any = resolved.recipe.model_dump(mode="json", exclude_unset=True)
            for part in key.split("."):
                value = value[part]
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            words.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    if resolved.reward is not None:
        words += ["--reward", resolved.reward.function]
    return words


def steps_after(
    result: Result, command: str, recipe: str, rows: Sequence[str] = ()
) -> list[NextStep]:
    """Return what one would type after ``mlx-slim COMMAND RECIPE`` gave ``result``.

    Args:
        result: Of the run.
        command: ``train`` or ``distill``.
        recipe: Its name or file.
        rows: The sources of its rows, as ``data.path`` names them.
    """
    named = result.model, result.artifact, result.on, result.base
    return after_run(result.out, command, recipe, *named, task=task_to_score(rows))


def sources_of(recipe: Mapping[str, Any]) -> list[str]:
    """Return the sources of rows that the recipe in a run's record names."""
    path = recipe["data"]["path"]
    return [path] if isinstance(path, str) else [one["path"] for one in path]


def _split(totals: RowTotals) -> str:
    if not totals.rows_split:
        return ""
    return f", {totals.rows_split:,} split: {totals.rows_after_splitting:,} rows in all"


def summary_rows(result: Result, unit: str = "nats/token") -> dict[str, str]:
    """Return the closing summary as name -> text; a loss is counted by ``unit``."""
    done, totals = result.done, RowTotals.read(result.ledger, str(result.out))
    rows = {
        "rows": f"{totals.rows_used:,} used of {totals.rows_given:,} given"
        f" ({totals.rows_dropped:,} dropped, {totals.rows_truncated:,} cut{_split(totals)})",
        "steps": f"{done.step:,} ({done.reason.replace('_', ' ')})",
        "tokens": f"{done.tokens:,} at {done.tokens / max(done.seconds, 1e-9):,.0f} tokens/s",
        "time": human_seconds(done.seconds)
        + (f" of computing, {done.duty:.0%} of the time (train.duty)" if done.duty else ""),
        "trained": f"{result.trainable:,} of {result.total:,} parameters "
        f"({result.trainable / result.total:.2%})",
        "peak memory": f"{human_bytes(done.peak_memory_bytes)} measured, "
        f"{human_bytes(result.predicted_peak_bytes)} predicted",
        "saved": f"{result.out / result.artifact} (reloaded, same logits)",
    }
    if (result.out / "second").is_dir():
        rows["second student"] = f"{result.out / 'second'} (reloaded, same logits)"
    if done.best_task is not None:
        rows["best task"] = f"{done.best_task:.1%} at step {done.best_step} (train.validate_task)"
        if done.best_validation is not None:
            rows["lowest validation"] = f"{done.best_validation:.4f} {unit}"
    elif done.best_validation is not None:
        rows["best validation"] = f"{done.best_validation:.4f} {unit} at step {done.best_step}"
    return rows
