"""Records of single questions, and the figures over them.

Invariant: an answer is right if it is one of the question's right ones; ``target`` of a record is
that one, or the list of them. ``k`` and ``n`` are whole numbers and ``value`` is k/n, so every
figure can be recounted from the samples. The likeliest choice is the first of equals. Standard
errors are those of the harness: √(p(1−p)/(n−1)), and for a task with subtasks their variances
pooled by size. Where none is defined (n = 1) it is None. Try it:
``mlx-slim eval MODEL --task mmlu --limit 5 -o out``.

    mc2         probability of the right choices, of the sum over all: a fraction of each question;
                its standard error is that of a mean
    macro F1    mean over the classes that occur (as answer or prediction) of 2·TP/(2·TP + FP + FN);
                its standard error is the jackknife's
    micro       all questions alike: Σk / Σn
    macro       all subtasks alike: the mean of their values
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.figures import (
    Figure,
    Figures,
    GroupFigures,
    Groups,
    SubtaskFigures,
    TaskSummary,
)
from mlx_slim.evaluation.tasks.extract import extract, normalize, same_json
from mlx_slim.evaluation.tasks.prompts import Question
from mlx_slim.evaluation.tasks.spec import Task
from mlx_slim.reading import JsonObject

_FIRST = ("acc_norm", "acc", "strict_match", "exact_match")
# The answer to one question: a line of ``samples_<task>.jsonl``. A mapping, because the task's own
# definition names keys of it: its filters and its metrics.
Record = JsonObject


def record_choice(
    task: Task, question: Question, loglikelihoods: Sequence[float], greedy: Sequence[bool]
) -> Record:
    """Return the record of a multiple-choice question.

    Args:
        task: Its task.
        question: The question.
        loglikelihoods: Of each choice, natural logarithm.
        greedy: Whether greedy decoding would give the choice.

    Raises:
        SlimError: If a log-likelihood is NaN.
    """
    values = [float(value) for value in loglikelihoods]
    if len(values) != len(question.choices):
        raise ValueError(f"{len(values)} log-likelihoods for {len(question.choices)} choices")
    if any(math.isnan(value) for value in values):
        raise SlimError(
            f"task {task.name}: question {question.doc_id}: a log-likelihood is not a number",
            "the model computes NaN: try --dtype float32, or another copy of the model",
        )
    record: Record = {"doc_id": question.doc_id}
    if question.subject is not None:
        record["subject"] = question.subject
    prediction = _first_best(values)
    record |= {
        "loglikelihoods": values,
        "greedy": [bool(value) for value in greedy],
        "prediction": prediction,
        "target": _one_or_all(question.targets),
        "acc": int(prediction in question.targets),
    }
    if "acc_norm" in task.metrics:
        per_character = [v / length for v, length in zip(values, question.lengths, strict=True)]
        record["acc_norm"] = int(_first_best(per_character) in question.targets)
    if "mc2" in task.metrics:
        largest = max(values)  # subtracted, so that not all of them underflow
        chances = [math.exp(value - largest) for value in values]
        right = math.fsum(chances[int(place)] for place in question.targets)
        record["mc2"] = right / math.fsum(chances)
    return record


def record_document(
    question: Question, loglikelihood: float, tokens: int, **more: int | str
) -> Record:
    """Return the record of a text that was predicted.

    Args:
        question: The text, or the block.
        loglikelihood: Of all its tokens that are predicted, natural logarithm.
        tokens: How many those are.
        more: Further keys: ``words`` and ``bytes`` of a document, ``ids_sha256`` of a block.
    """
    return {
        "doc_id": question.doc_id,
        "loglikelihood": loglikelihood,
        "tokens": tokens,
        **more,
    }


def record_generation(task: Task, question: Question, text: str, stop_reason: str) -> Record:
    """Return the record of a generated answer.

    Args:
        task: Its task.
        question: The question.
        text: The answer, cut before its stop.
        stop_reason: ``until``, ``length`` or ``eos``.
    """
    spec, wholes = task.spec, list(map(str, question.targets))
    targets = [normalize(spec, whole) for whole in wholes]
    record: Record = {"doc_id": question.doc_id}
    if question.subject is not None:
        record["subject"] = question.subject
    record |= {"generation": text, "stop_reason": stop_reason}
    answers = {
        name: normalize(spec, extract(answer_filter, text))
        for name, answer_filter in spec.filters.items()
    }
    record |= answers
    record["target"] = _one_or_all(targets)
    for metric in task.metrics:
        if metric == "exact_match":
            right = normalize(spec, text) in targets
        elif metric == "json_match":
            right = any(same_json(text, whole) for whole in wholes)
        else:
            right = answers[metric.removesuffix("_match")] in targets
        record[metric] = int(right)
    return record


def _one_or_all(targets: Sequence[int | str]) -> Any:
    """Return the right answer, or the list of them, as a record holds it."""
    return targets[0] if len(targets) == 1 else list(targets)


def _first_best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: (values[index], -index))


def first_metric(metrics: Iterable[str]) -> str:
    """Return the main metric of a task: the first of ``_FIRST`` that it has, else its own first."""
    names = list(metrics)
    return next((name for name in _FIRST if name in names), names[0])


def counted(metrics: Iterable[str], record: Mapping[str, Any]) -> list[str]:
    """Return the metrics that have a value for each question, in order.

    Where there is none (``macro_f1`` alone), ``acc`` is used: every choice record has it.
    """
    return [name for name in metrics if name in record] or ["acc"]


# ------------------------------------------------------------------------------------- summaries


def stderr(k: int, n: int) -> float | None:
    """Return √(p(1−p)/(n−1)) of k right answers out of n; None for fewer than two."""
    if n < 2:
        return None
    mean = k / n
    return math.sqrt(mean * (1 - mean) / (n - 1))


def pooled_stderr(errors: Sequence[float | None], sizes: Sequence[int]) -> float | None:
    """Return the standard error over all questions of several subtasks, as the harness pools it.

    √(Σ (n_i − 1)·n_i·se_i² / (Σ n_i − subtasks) / Σ n_i); a subtask of one question adds no
    variance. None where no subtask has two questions.
    """
    freedom = sum(sizes) - len(sizes)
    if freedom < 1:
        return None
    spread = sum((n - 1) * n * (e or 0.0) ** 2 for e, n in zip(errors, sizes, strict=True))
    return math.sqrt(spread / freedom / sum(sizes))


def summarize(task: Task, records: Sequence[Mapping[str, Any]]) -> TaskSummary:
    """Return the figures over the records of one task; its groups too where it has subtasks."""
    if task.kind == "perplexity":
        return TaskSummary(
            len(records), {name: Figure(perplexity(name, records)) for name in task.metrics}
        )
    if not task.subtasks:
        return TaskSummary(len(records), {name: figure(name, records) for name in task.metrics})
    assert task.spec.subgroups is not None  # it has subtasks
    by_part: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_part.setdefault(record["subject"], []).append(record)
    category = task.spec.subgroups.subtasks
    subtasks = {
        part: SubtaskFigures(
            len(by_part[part]),
            {name: figure(name, by_part[part]) for name in task.metrics},
            category[part],
        )
        for part in task.subtasks
        if part in by_part
    }
    group = _group(task, list(subtasks.values()), records)
    categories = {}
    for name in task.spec.subgroups.categories:
        members = [part for part, summary in subtasks.items() if summary.category == name]
        if members:
            inside = [record for part in members for record in by_part[part]]
            categories[name] = _group(task, [subtasks[part] for part in members], inside)
    return TaskSummary(len(records), group.micro, Groups(group, categories, subtasks))


def figure(metric: str, records: Sequence[Mapping[str, Any]]) -> Figure:
    """Return a metric over records of one task."""
    if metric == "macro_f1":
        return _macro_f1([(record["target"], record["prediction"]) for record in records])
    values, n = [record[metric] for record in records], len(records)
    if any(isinstance(value, float) for value in values):
        mean = math.fsum(values) / n
        spread = math.fsum((value - mean) ** 2 for value in values)
        return Figure(mean, math.sqrt(spread / (n - 1) / n) if n > 1 else None)
    k = sum(values)
    return Figure(k / n if n else 0.0, stderr(k, n), k)


def perplexity(metric: str, records: Sequence[Mapping[str, Any]]) -> float:
    """Return a metric over the texts of a task, each of its units alike."""
    nats = -math.fsum(record["loglikelihood"] for record in records)
    unit = {"word_perplexity": "words", "byte_perplexity": "bytes", "bits_per_byte": "bytes"}
    each = nats / sum(record[unit.get(metric, "tokens")] for record in records)
    return each / math.log(2) if metric.startswith("bits_per_") else math.exp(min(each, 700.0))


def _group(
    task: Task, subtasks: Sequence[SubtaskFigures], records: Sequence[Mapping[str, Any]]
) -> GroupFigures:
    """Return the figures over several subtasks."""
    micro: Figures = {}
    macro: Figures = {}
    sizes = [summary.n for summary in subtasks]
    for metric in task.metrics:
        figures = [summary.metrics[metric] for summary in subtasks]
        errors = [figure.stderr for figure in figures]
        micro[metric] = figure(metric, records)
        if metric != "macro_f1":
            micro[metric] = replace(micro[metric], stderr=pooled_stderr(errors, sizes))
        defined = [error for error in errors if error is not None]
        alone = len(defined) < len(errors) or not errors
        macro[metric] = Figure(
            math.fsum(figure.value for figure in figures) / max(len(figures), 1),
            None if alone else math.hypot(*defined) / len(defined),
        )
    return GroupFigures(len(records), micro, macro)


def _macro_f1(pairs: Sequence[tuple[int, int]]) -> Figure:
    """Return macro F1 of (answer, prediction) pairs, with its jackknife standard error."""
    counts, n = Counter(pairs), len(pairs)
    value = _f1(counts.items())
    error = None
    if n > 1:
        # Leaving out one question of a cell gives the same value for all questions of that cell.
        without = {
            cell: _f1([(other, m - (other == cell)) for other, m in counts.items()])
            for cell in counts
        }
        mean = math.fsum(counts[cell] * without[cell] for cell in counts) / n
        spread = math.fsum(counts[cell] * (without[cell] - mean) ** 2 for cell in counts)
        error = math.sqrt((n - 1) / n * spread)
    return Figure(value, error)


def _f1(cells: Any) -> float:
    answers: Counter[int] = Counter()
    predictions: Counter[int] = Counter()
    right: Counter[int] = Counter()
    for (answer, prediction), count in cells:
        answers[answer] += count
        predictions[prediction] += count
        if answer == prediction:
            right[answer] += count
    classes = [c for c in {*answers, *predictions} if answers[c] + predictions[c]]
    if not classes:
        return 0.0
    return math.fsum(2 * right[c] / (answers[c] + predictions[c]) for c in classes) / len(classes)
