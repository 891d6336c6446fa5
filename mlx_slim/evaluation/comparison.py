"""Paired comparison of two finished evaluations, question by question.

Invariant: results are compared only where rows (by checksum and row number), shots and task
versions are equal; else an error names what differs. Holm's correction covers one test per task, on
its first metric; the other metrics are shown without a verdict.
Try it: ``mlx-slim eval --compare OUT_A OUT_B``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_slim.artifacts import SCHEMA_VERSION, hash_file
from mlx_slim.data.fingerprint import fingerprint_difference
from mlx_slim.errors import SlimError
from mlx_slim.evaluation import stats
from mlx_slim.evaluation.records import EvalResults, TaskSection, TextSection
from mlx_slim.evaluation.results import (
    RESULTS_FILE,
    check_sample,
    load_results,
    read_samples,
    samples_name,
)
from mlx_slim.evaluation.tasks.metrics import Record, counted, first_metric
from mlx_slim.reading import JsonObject, field

POINTS, BITS, BITS_TOKEN = "points", "bits/byte", "bits/token"


@dataclass(frozen=True)
class MetricComparison:
    """One metric of one task; differences are second minus first.

    Attributes:
        task: The task.
        metric: ``acc_norm``, …, or ``bits_per_byte`` and ``bits_per_token``, where lower is better.
        num_fewshot: Solved examples before each question; None for text.
        unit: ``points`` (hundredths), ``bits/byte`` or ``bits/token``.
        paired: The statistics; fractions of the questions, or bits per byte.
        gained: ``doc_id`` of the questions where only the second is right.
        lost: ``doc_id`` of the questions where only the first is right.
        p_holm: p value adjusted over the tasks; None for a task's further metrics.
        verdict: One sentence; empty for further metrics.
        chance: Expected accuracy of guessing; None where no answers are counted.
    """

    task: str
    metric: str
    num_fewshot: int | None
    unit: str
    paired: stats.Paired
    gained: list[Any]
    lost: list[Any]
    p_holm: float | None = None
    verdict: str = ""
    chance: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The comparison of all tasks that two evaluations have in common.

    Attributes:
        first: Model (and adapter) of the first.
        second: Of the second.
        rows: One a task and metric.
        notes: What the reader should know, one line each.
        draws: Bootstrap resamples.
        seed: Of the bootstrap.
    """

    first: str
    second: str
    rows: list[MetricComparison]
    notes: list[str]
    draws: int
    seed: int

    def as_record(self) -> JsonObject:
        """Return ``comparison.json``."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def compare(out_a: Path, out_b: Path, *, draws: int = stats.DRAWS, seed: int = 0) -> Comparison:
    """Compare the evaluations in two output folders.

    Args:
        out_a: Of the first model.
        out_b: Of the second.
        draws: Bootstrap resamples.
        seed: Of the bootstrap.

    Raises:
        SlimError: If either is incomplete or damaged, they have no task in common, or a common
            task was scored with other rows, shots or task versions.
    """
    results = [load_results(out) for out in (out_a, out_b)]
    sections = [result.sections for result in results]
    common = [name for name in sections[0] if name in sections[1]]
    if not common:
        held = [", ".join(names) for names in sections]
        raise SlimError(
            f"no task in common: {out_a} has {held[0]}, {out_b} has {held[1]}",
            "score both on the same tasks",
        )
    notes = [
        f"{name}: only in {out}"
        for out, by_task in zip((out_a, out_b), sections, strict=True)
        for name in by_task
        if name not in common
    ]
    settings = [asdict(result.settings) for result in results]
    notes += [
        f"settings differ: {line}" for line in fingerprint_difference(settings[0], settings[1], "")
    ]
    differing: list[str] = []
    for name in common:
        first, second = (by_task[name].compared() for by_task in sections)
        differing += fingerprint_difference(first, second, name)
    if differing:
        raise SlimError(
            f"{out_a} and {out_b} cannot be compared: {'; '.join(differing)}",
            "score both on the same rows, with the same shots and task versions",
        )
    rows: list[MetricComparison] = []
    for name in common:
        samples = [
            _samples(out, name, by_task[name])
            for out, by_task in zip((out_a, out_b), sections, strict=True)
        ]
        rows += _rows(name, sections[0][name], samples, draws, seed, tests=len(common))
    judged = _judged(rows)
    notes += [note for row in judged if (note := _no_better_than_guessing(row))]
    return Comparison(_who(results[0]), _who(results[1]), judged, notes, draws=draws, seed=seed)


def _no_better_than_guessing(row: MetricComparison) -> str:
    """Return a line if a task's verdict is about models that guess; empty otherwise."""
    if not row.verdict or row.chance is None:
        return ""
    n, level = row.paired.n, f"the chance level of {100 * row.chance:.1f} points"
    sides = {"A": row.paired.first, "B": row.paired.second}
    low = [who for who, x in sides.items() if not stats.above_chance(x * n, n, row.chance)]
    if not low:
        return ""
    who = "neither A nor B is" if len(low) == 2 else f"{low[0]} is not"
    return f"{row.task}: {who} detectably above {level}"


def _who(results: EvalResults) -> str:
    return f"{results.model} + {results.adapter}" if results.adapter else results.model


def _samples(out: Path, task: str, section: TaskSection | TextSection) -> list[Record]:
    path = out / samples_name(task)
    samples = read_samples(path)
    if hash_file(path) != section.samples_sha256:
        raise SlimError(f"{path} was changed after {out} was scored", "score the model again")
    if len(samples) != section.n:
        raise SlimError(
            f"{path} holds {len(samples)} questions, {RESULTS_FILE} says {section.n}",
            "score the model again",
        )
    text = _predicts(section, samples)
    scores = () if text else counted(section.metrics, samples[0])
    for number, sample in enumerate(samples, 1):
        where = f"{path}, line {number}"
        check_sample(sample, where, scores)
        if text:
            field(sample, where, "loglikelihood", float)
            field(sample, where, "window", int, None)
            for key in ("bytes", "tokens"):
                field(sample, where, key, int, 1, low=1)
    if len({sample.get("subject") is None for sample in samples}) > 1:
        raise SlimError(f"{path}: some questions have a subject, others none", "score it again")
    return samples


def _rows(
    task: str,
    section: TaskSection | TextSection,
    samples: Sequence[list[Record]],
    draws: int,
    seed: int,
    *,
    tests: int,
) -> list[MetricComparison]:
    keys = [[(s.get("subject"), s["doc_id"], s.get("window")) for s in side] for side in samples]
    if keys[0] != keys[1]:
        raise SlimError(
            f"{task}: the two files hold different questions", "score both models again"
        )
    strata = [key[0] for key in keys[0]] if keys[0][0][0] is not None else None
    text, unit = _predicts(section, samples[0]), POINTS
    if (
        text
    ):  # scaled such that the mean over documents is bits per byte, over blocks bits per token
        metric, unit, size = _measure(task, section, samples)
        samples = [_documents(side) for side in samples]
        scale = -len(samples[0]) / math.log(2) / size
        values = {metric: [[s["loglikelihood"] * scale for s in x] for x in samples]}
    else:
        metrics = counted(section.metrics, samples[0][0])
        values = {name: [[s[name] for s in side] for side in samples] for name in metrics}
    rows = []
    for metric, (a_N, b_N) in values.items():
        ids = [sample["doc_id"] for sample in samples[0]]
        changed = list(zip(ids, a_N, b_N, strict=True))
        rows.append(
            MetricComparison(
                task=task,
                metric=metric,
                num_fewshot=None
                if isinstance(section, TextSection)
                else section.questions.num_fewshot,
                unit=unit,
                paired=stats.paired(a_N, b_N, strata, draws=draws, seed=seed, tests=tests),
                gained=[] if text else [i for i, a, b in changed if b > a],
                lost=[] if text else [i for i, a, b in changed if b < a],
                chance=None if text or metric == "mc2" else stats.chance_level(samples[0]),
            )
        )
    return rows


def _predicts(section: TaskSection | TextSection, samples: Sequence[Record]) -> bool:
    """Return whether the records are of texts that were predicted, not of answers."""
    return isinstance(section, TextSection) or "loglikelihood" in samples[0]


def _measure(
    task: str, section: TaskSection | TextSection, samples: Sequence[list[Record]]
) -> tuple[str, str, int]:
    """Return metric, unit and how many units the texts have.

    Raises:
        SlimError: If blocks of the two sides hold other tokens.
    """
    if isinstance(section, TextSection):
        return "bits_per_byte", BITS, section.bytes
    if "bytes" in samples[0][0]:
        return "bits_per_byte", BITS, sum(record["bytes"] for record in samples[0])
    blocks = [[record.get("ids_sha256") for record in side] for side in samples]
    if blocks[0] != blocks[1]:
        raise SlimError(
            f"{task}: the two models cut the text into other tokens: bits per token do not compare",
            "compare bits per byte: --task wikitext",
        )
    return "bits_per_token", BITS_TOKEN, sum(record["tokens"] for record in samples[0])


def _documents(windows: list[Record]) -> list[Record]:
    """Return one record a document: its windows are not independent.

    The bootstrap draws documents; a single document is drawn by its windows instead.
    """
    sums: dict[Any, float] = {}
    for window in windows:
        sums[window["doc_id"]] = sums.get(window["doc_id"], 0.0) + window["loglikelihood"]
    if len(sums) == 1:
        return windows
    return [{"doc_id": doc_id, "loglikelihood": value} for doc_id, value in sums.items()]


def _judged(rows: list[MetricComparison]) -> list[MetricComparison]:
    """Return the rows with adjusted p values and verdicts on each task's first metric."""
    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(row.task, []).append(row.metric)
    first = {task: first_metric(metrics) for task, metrics in names.items()}
    family = [row for row in rows if row.metric == first[row.task]]
    adjusted = dict(
        zip(
            (row.task for row in family),
            stats.holm([row.paired.p_value for row in family]),
            strict=True,
        )
    )
    judged = []
    for row in rows:
        if row.metric != first[row.task]:
            judged.append(row)
            continue
        p_holm = adjusted[row.task]
        words = stats.verdict(row.paired.delta, p_holm, row.paired.detectable, unit=row.unit)
        judged.append(MetricComparison(**{**vars(row), "p_holm": p_holm, "verdict": words}))
    return judged
