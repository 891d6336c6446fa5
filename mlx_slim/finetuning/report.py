"""One page that shows a run: curves, memory, rows, answers before and after, and how to use it.

Invariant: everything is read from the run folder, complete, running or killed; the page needs no
network and no script; all text is escaped, and no path stands on it but those that the user typed.
Try it: ``mlx-slim report runs/try``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mlx_slim.artifacts import write_text
from mlx_slim.data.ledger import LEDGER_FILE
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.examples import task_to_score
from mlx_slim.finetuning.curves import Level, Series, chart, smooth
from mlx_slim.finetuning.logged import events_of
from mlx_slim.finetuning.policy_charts import policy_charts, reward_curve
from mlx_slim.finetuning.preference_curves import loss_title, preference_charts
from mlx_slim.finetuning.reward_source import reward_source
from mlx_slim.finetuning.round_curves import round_charts
from mlx_slim.finetuning.run_dir import (
    ANSWERS_FILE,
    RECORD,
    STATE_FILE,
    command_words,
    current_recipe,
    sources_of,
)
from mlx_slim.locks import is_locked
from mlx_slim.next_steps import NextStep, after_run, step
from mlx_slim.pages import environment
from mlx_slim.reading import (
    JsonObject,
    check_fields,
    library_errors,
    read_object,
    short,
)
from mlx_slim.run_dir import LOCK_FILE
from mlx_slim.units import byte_unit

PAGE_FILE = "report.html"
_TEMPLATES = Path(__file__).with_name("templates")
_HIDDEN = ("model", "data", "distill")  # settings that stand elsewhere, or hold paths of teachers
# What the page shows of each record.
_STATE = {"recipe.model": str, "recipe.method": str, "recipe.data": dict}
_RESULT = {
    **{f"result.{key}": str for key in ("model", "artifact")},
    **{f"result.{key}": int for key in ("trainable", "total", "predicted_peak_bytes")},
    **{f"result.done.{key}": int for key in ("tokens", "peak_memory_bytes")},
    **{"result.done.seconds": float, "provenance.system": str, "provenance.python": str},
    "provenance.versions": dict,
}
_LEDGER = {
    **{f"totals.rows_{key}": int for key in ("given", "used", "dropped", "truncated")},
    **{f"totals.{key}": int for key in ("tokens", "supervised_tokens")},
    **{f"split.{key}": int for key in ("train_rows", "validation_rows")},
    **{f"sources.*.rows_{key}": int for key in ("given", "used")},
    **{"template": str, "sources.*.path": str, "sources.*.rows_dropped.*.count": int},
    "sources.*.rows_dropped.*.first": list,
}
_ANSWERS = {"max_tokens": int, "rows": list, "rows.*.prompt": str, "rows.*.reference": str}


def write_page(
    out: Path, record: Mapping[str, Any] | None = None, *, facts: Sequence[str] = ()
) -> Path:
    """Write ``report.html`` of the run in ``out``; return its path.

    Args:
        out: The run folder.
        record: ``run.json`` that is about to be written; None reads it, if it is there.
        facts: Of what was done to the model before, a fact a line.

    Raises:
        SlimError: If ``out`` holds no run, or a record in it is damaged.
    """
    page = out / PAGE_FILE
    write_text(page, render(out, record, facts=facts))
    return page


def is_run(folder: Path) -> bool:
    """Return whether ``folder`` holds a run that has started."""
    return (folder / STATE_FILE).is_file()


def render(
    out: Path,
    record: Mapping[str, Any] | None = None,
    *,
    facts: Sequence[str] = (),
    script: str = "",
) -> str:
    """Return the page; the arguments are ``write_page``'s.

    Args:
        out: The run folder.
        record: ``run.json``, or None.
        facts: Of what was done to the model before.
        script: Put into the page; of a page that is served.
    """
    if not is_run(out):
        raise SlimError(
            f"{out} holds no run: {STATE_FILE} is not there",
            "give the folder that train -o, distill -o or prune --recover -o named",
        )
    with library_errors(f"{short(out)}: a record in it is damaged", "start a new run"):
        values = _values(out, record)
        page = environment(_TEMPLATES).get_template("run.html.j2")
        text = page.render(**values, facts=facts, script=Markup(script))
    return text.encode(errors="replace").decode()  # of a path that is not UTF-8


def _values(out: Path, record: Mapping[str, Any] | None) -> JsonObject:
    """Return what the template shows."""
    state = _read(out / STATE_FILE, _STATE) or {}
    if record is None:
        record = _read(out / RECORD, _RESULT)
    ledger, answers = _read(out / LEDGER_FILE, _LEDGER), _read(out / ANSWERS_FILE, _ANSWERS)
    told = events_of(out)
    result = record["result"] if record else None
    recipe = state["recipe"]
    steps = [event for event in told if event.get("event") == "step"]
    validations = [event for event in told if event.get("event") == "validation"]
    tasks = [event for event in told if event.get("event") == "task_validation"]
    rounds = [event for event in told if event.get("event") == "round"]
    started = next((e for e in reversed(told) if e.get("event") == "started"), None)
    status = "complete" if record else "running" if is_locked(out / LOCK_FILE) else "stopped"
    predicted = _predicted(told, result)
    last = steps[-1] if steps else None
    return {
        "name": state.get("name") or out.name,
        "folder": str(out),
        "status": status,
        "recipe": recipe,
        "headline": _headline(status, steps, validations, started, reward_curve(rounds)),
        "last": last,
        "total_steps": started.get("total_steps") if started else None,
        "best": min(
            (v for v in validations if v.get("best")), key=lambda v: v["loss"], default=None
        ),
        "best_task": max(
            (a for a in tasks if a.get("best")),
            key=lambda one: one["value"],
            default=None,
        ),
        "seconds": result["done"]["seconds"] if result else None,
        "result": result,
        "charts": [
            *_charts(steps, validations, tasks, predicted, started, loss_title(recipe)),
            *preference_charts(steps, validations),
            *policy_charts(steps),
            *round_charts(rounds, result["done"]["seconds"] if result else None),
        ],
        "memory": _memory(steps, result, predicted, started),
        "ledger": ledger,
        "answers": answers,
        "commands": _commands(out, state, result),
        "settings": _settings(state, recipe),
        "provenance": record["provenance"] if record else None,
    }


def _read(file: Path, shown: Mapping[str, type]) -> JsonObject | None:
    """Return a record that has what is ``shown`` of it; None where there is no file."""
    if not file.is_file():
        return None
    values = read_object(file)
    check_fields(values, short(file), shown)
    return values


def _headline(
    status: str,
    steps: Sequence[Mapping[str, Any]],
    validations: Sequence[Mapping[str, Any]],
    started: Mapping[str, Any] | None,
    rewards: Sequence[tuple[float, float]],
) -> str:
    """Return what happened, in a sentence."""
    if not steps:
        return "No step was taken yet."
    of = f" of {started['total_steps']:,}" if started else ""
    took = f"{steps[-1]['step']:,}{of} steps"
    curve, word = (validations, "Validation") if len(validations) > 1 else (steps, "Training")
    first, last = curve[0]["loss"], min(event["loss"] for event in curve[1:] or curve)
    if curve is steps:
        means = smooth([(event["step"], event["loss"]) for event in steps]) or [(0, math.nan)]
        first, last = means[0][1], means[-1][1]
    where = {"complete": "after", "running": "so far, after", "stopped": "when it stopped, after"}
    if rewards:
        begin, end = rewards[0][1], rewards[-1][1]
        return f"Mean reward {begin:.3f} → {end:.3f} {where[status]} {took}."
    change = f" ({last / first - 1:+.0%})".replace("-", "−") if first else ""
    return f"{word} loss {first:.3f} → {last:.3f}{change} {where[status]} {took}."


def _predicted(
    told: Sequence[Mapping[str, Any]], result: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """Return the prediction: ``predicted_peak_bytes`` and, of newer runs, ``breakdown``."""
    event = next((e for e in reversed(told) if e.get("event") == "predicted"), None)
    if event is None and result is not None:
        return {"predicted_peak_bytes": result["predicted_peak_bytes"], "breakdown": {}}
    return event


def _points(events: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(e["step"]), float(e[key])) for e in events if e.get(key) is not None]


def _charts(
    steps: Sequence[Mapping[str, Any]],
    validations: Sequence[Mapping[str, Any]],
    tasks: Sequence[Mapping[str, Any]],
    predicted: Mapping[str, Any] | None,
    started: Mapping[str, Any] | None,
    title: str,
) -> list[tuple[str, Markup]]:
    """Return (title, picture) of each curve that has points."""
    loss = _points(steps, "loss")
    peaks = _points(steps, "peak_memory_bytes")
    most = max([y for _, y in peaks] + [predicted["predicted_peak_bytes"] if predicted else 1])
    unit, unit_name = byte_unit(most)
    levels = []
    if predicted:
        levels.append(Level(predicted["predicted_peak_bytes"], "predicted peak"))
    if started and started["budget_bytes"] <= 1.5 * most:
        levels.append(Level(started["budget_bytes"], "budget"))
    drawn = [
        (
            title,
            chart(
                "loss by step",
                [
                    Series("", loss, "--c2", "faint"),
                    Series("training, smoothed", smooth(loss), "--c2"),
                    Series("validation", _points(validations, "loss"), "--c5", "dots"),
                ],
                y=lambda value: f"{value:.3g}",
            ),
        ),
        (
            f"Task: {tasks[0].get('task')}, {tasks[0].get('metric')}" if tasks else "",
            chart(
                "metric of the validation task by step",
                [Series("", _points(tasks, "value"), "--c5", "dots")],
                y=lambda value: f"{value:.0%}",
            ),
        ),
        (
            "Learning rate",
            chart(
                "learning rate by step",
                [Series("learning rate", _points(steps, "learning_rate"), "--c3")],
                y=lambda value: f"{value:.1e}".replace("e-0", "e-") if value else "0",
                zero=True,
            ),
        ),
        (
            "Speed, tokens/s",
            chart(
                "tokens per second by step",
                [
                    Series("", _points(steps, "tokens_per_second"), "--c6", "faint"),
                    Series("tokens/s", smooth(_points(steps, "tokens_per_second")), "--c6"),
                ],
                y=lambda value: f"{value:,.4g}",
                zero=True,
            ),
        ),
        (
            f"Memory, {unit_name}",
            chart(
                "memory by step",
                [
                    Series("in use", _points(steps, "active_memory_bytes"), "--c1"),
                    Series("peak", peaks, "--c4"),
                ],
                y=lambda value: f"{value / unit:.3g}",
                levels=levels,
                zero=True,
            ),
        ),
    ]
    return [(title, picture) for title, picture in drawn if picture is not None]


@dataclass(frozen=True)
class _Memory:
    """Bytes, each None where it is not known.

    Attributes:
        predicted: The peak, before the run.
        measured: The peak.
        budget: Allowed.
        breakdown: Components of the prediction.
    """

    predicted: int | None
    measured: int | None
    budget: int | None
    breakdown: dict[str, int]

    @property
    def off(self) -> float | None:
        """How far the prediction is off, a fraction of what was measured."""
        if not self.predicted or not self.measured:
            return None
        return self.predicted / self.measured - 1


def _memory(
    steps: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any] | None,
    predicted: Mapping[str, Any] | None,
    started: Mapping[str, Any] | None,
) -> _Memory:
    """Return predicted, measured and allowed bytes."""
    measured = max((e["peak_memory_bytes"] for e in steps), default=None)
    if result is not None:
        measured = result["done"]["peak_memory_bytes"]
    expected = predicted["predicted_peak_bytes"] if predicted else None
    return _Memory(
        predicted=expected,
        measured=measured,
        budget=started["budget_bytes"] if started else None,
        breakdown={k: v for k, v in predicted["breakdown"].items() if v} if predicted else {},
    )


def _commands(
    out: Path, state: Mapping[str, Any], result: Mapping[str, Any] | None
) -> list[NextStep]:
    """Return what one would type next: to use the run, or to resume it."""
    source = str(state.get("given") or state.get("name") or "RECIPE")
    if result is None:
        from mlx_slim.config.load import Resolved  # pydantic: half of what a page takes
        from mlx_slim.config.schema import Recipe

        recipe = Recipe.model_validate(current_recipe(state["recipe"]))
        resolved = Resolved(
            recipe,
            state.get("origins", {}),
            str(state.get("name")),
            source,
            reward=reward_source(dict(state), out / STATE_FILE),
        )
        return [
            step("resume it", "mlx-slim", *command_words(resolved), "-o", out, "--resume"),
            step("watch it", "mlx-slim", "report", out, "--watch"),
        ]
    return after_run(
        out,
        command="train" if state["recipe"].get("distill") is None else "distill",
        recipe=source,
        model=result["model"],
        artifact=result["artifact"],
        on=result.get("on") or (),
        base=result.get("base"),
        task=task_to_score(sources_of(state["recipe"])),
    )


def _settings(state: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (key, value, where it comes from) of each setting that is not a default."""
    rows = []
    for key, origin in state.get("origins", {}).items():
        if key.split(".")[0] in _HIDDEN or origin == "default":
            continue
        value: Any = recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        rows.append((key, str(value), Path(str(origin)).name))
    return sorted(rows)
