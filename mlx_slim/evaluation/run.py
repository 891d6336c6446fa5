"""Score models on tasks and texts: prepare → run → save.

Invariant: names, data, adapters, output and memory are checked before any weight is read; computed
chunks are on disk; a killed run resumes with ``resume`` and its samples are byte for byte those of
an uninterrupted one, on one process or on several. Try it:
``mlx-slim eval MODEL --task openbookqa,arc_easy --limit 100 -o OUT``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

from mlx_slim import artifacts, events, runtime
from mlx_slim.agreement import on_every_rank, refuse_differences
from mlx_slim.evaluation.divided import shared_memory
from mlx_slim.evaluation.options import EvalOptions
from mlx_slim.evaluation.plan import find_targets, result_folders
from mlx_slim.evaluation.records import TEXT
from mlx_slim.evaluation.results import RESULTS
from mlx_slim.evaluation.score import Target, score
from mlx_slim.reading import JsonObject
from mlx_slim.run_dir import RunDir, option_words

__all__ = ["EvalOptions", "command_words", "evaluate", "result_folders"]

SUMMARY_FILE = "summary.json"
_T = TypeVar("_T")


class _Nobody:
    def notify(self, event: events.Event) -> None:
        """Ignore the event."""


def evaluate(
    models: str | Path | Sequence[str | Path],
    tasks: str | Sequence[str],
    out: Path,
    options: EvalOptions | None = None,
    *,
    resume: bool = False,
    observer: events.Observer | None = None,
) -> list[JsonObject]:
    """Score models on tasks; write ``results.json`` and ``samples_<task>.jsonl``.

    Args:
        models: Folders or hub ids; several get a folder each inside ``out``.
        tasks: Names of tasks and suites, or paths of task files.
        out: The output folder; must be new unless ``resume``.
        options: How; the defaults of ``EvalOptions`` otherwise.
        resume: Continue the evaluation in ``out``, which was started with the same values.
        observer: Notified of every event, on rank 0.

    Returns:
        The results of each model, as in its ``results.json``.

    Raises:
        SlimError: Whatever is wrong with the input, before any weight is read.
        ResourceError: Not enough memory or disk.
        Interrupted: Ctrl-C; what is computed stays.
    """
    options = options or EvalOptions()
    sources = [str(models)] if isinstance(models, (str, Path)) else [str(model) for model in models]
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    watcher = observer if observer and runtime.world().rank() == 0 else _Nobody()
    memory = shared_memory()
    targets = _first_rank_first(lambda: find_targets(sources, names, out, options, resume, memory))
    refuse_differences(_rank_facts(targets))
    if resume and runtime.world().rank() == 0 and not any(target.started for target in targets):
        watcher.notify(events.Notice(f"{out} holds no results to resume: starting"))
    message = f"stopped; every whole chunk of questions is saved in {out}"
    folders = [RunDir(target.folder, RESULTS) for target in targets]
    words = partial(command_words, sources, names, options)
    with RunDir(out, RESULTS).resumable(words, message, *folders):
        results = [score(target, watcher) for target in targets]
    if len(targets) > 1 and runtime.world().rank() == 0:
        artifacts.write_json(out / SUMMARY_FILE, _summary(targets, results))
    return results


def _first_rank_first(work: Callable[[], _T]) -> _T:
    """Return ``work()`` on every rank: rank 0 goes first, and it alone reports errors."""
    done: list[_T] = []
    runtime.from_first_rank(lambda: done.append(work()))
    return on_every_rank(lambda: done[0] if done else work())


def _rank_facts(targets: Sequence[Target]) -> JsonObject:
    """Return what must be equal on all ranks before they score."""
    facts: JsonObject = {}
    for target in targets:
        state = {**asdict(target.state), "split": target.split, "dense": None, "cache_bytes": None}
        state.pop("system")
        facts |= {"python": state.pop("python"), **state.pop("versions")}
        facts["the device"] = state.pop("device")
        of = f" of {target.source}" if len(targets) > 1 else ""
        facts[f"the model's files{of}"] = state.pop("weights_sha256")
        facts[f"the adapter's files{of}"] = state.pop("adapter_sha256")
        for name, description in state.pop("tasks").items():
            facts[f"the rows of {name}"] = description.pop("rows_sha256", None)
            facts[f"the task {name}{of}"] = artifacts.hash_json(description)
        facts[f"the options{of}"] = artifacts.hash_json(state)
    return facts


def _summary(targets: list[Target], results: list[JsonObject]) -> JsonObject:
    """Return ``summary.json``: each model's folder and metrics."""
    return {
        "schema_version": artifacts.SCHEMA_VERSION,
        "models": {
            target.folder.name: {
                "model": target.source,
                "adapter": target.adapter,
                **{name: result["tasks"][name]["metrics"] for name in result["tasks"]},
                **({TEXT: result[TEXT]["metrics"]} if TEXT in result else {}),
            }
            for target, result in zip(targets, results, strict=True)
        },
    }


def command_words(sources: Sequence[str], names: Sequence[str], options: EvalOptions) -> list[str]:
    """Return the command that started an evaluation, without its folder: for ``RunDir``."""
    tasks = [word for name in names for word in ("--task", name)]
    return ["eval", *sources, *tasks, *option_words(options)]
