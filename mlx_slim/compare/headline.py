"""The result of a matrix in a few sentences, each supported by its numbers.

Invariant: every sentence comes from a claim (``claims.py``) with its interval and the chance level;
where the corrected test flags nothing it says "no detectable difference", where a model guesses it
says that retention cannot be measured; a method that was selected by its test score is labelled so.
No measured time or memory changes the text: two runs of one matrix give the same sentences.
Try it: ``mlx-slim report DIR``.
"""

from __future__ import annotations

from statistics import mean, median

from mlx_slim.compare.claims import MethodComparison, MethodScore
from mlx_slim.compare.report_records import Contrast, ReportTask, Row
from mlx_slim.evaluation.stats import LEVEL

_WAYS = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA", "dora": "DoRA"}


def headline(
    rows: list[Row],
    contrasts: list[Contrast],
    pooled: list[MethodComparison],
    scores: dict[str, list[MethodScore]],
    tasks: list[ReportTask],
) -> list[str]:
    """Return the sentences.

    Args:
        rows: Lines of the matrix table.
        contrasts: Paired comparisons of the table, corrected.
        pooled: Claims, corrected.
        scores: Model -> the mean of each of its methods.
        tasks: The tasks, with metric and number of questions.
    """
    lines: list[str] = []
    several = len(scores) > 1
    for model, methods in scores.items():
        cells = [row for row in rows if row.model == model]
        claims = [claim for claim in pooled if claim.model == model]
        sentences = _of_model(cells, claims, methods)
        if several:
            lines += [f"{model}: {line}" for line in sentences]
        else:
            lines += [line[0].upper() + line[1:] for line in sentences]
    if contrasts:
        lines.append(_resolution(contrasts, tasks))
    return lines


def _of_model(
    rows: list[Row], claims: list[MethodComparison], scores: list[MethodScore]
) -> list[str]:
    by_what: dict[str, list[MethodComparison]] = {}
    for claim in claims:
        by_what.setdefault(claim.what, []).append(claim)
    if "pruned" in by_what:
        return [_pruned(claim, by_what.get("recovered", []), rows) for claim in by_what["pruned"]]
    lines = [_retention(claim, rows) for claim in by_what.get("kept", [])]
    if gains := by_what.get("gain"):
        lines.append(_gain(max(gains, key=lambda claim: claim.second.value), len(gains)))
    if lines:
        if not any(row.kind == "base" for row in rows):
            lines.append(
                "this matrix has no untrained base, so the effect of tuning cannot be measured."
            )
        return lines
    base = [row.method for row in rows if row.kind == "base"]
    shown = [s for s in scores if s.method in base] or scores
    lines = [f"{_way(score.method)} has {_alone(score)}." for score in shown]
    if not base:
        lines.append("this matrix has no untrained base, so no effect can be measured.")
    return lines


def _retention(claim: MethodComparison, rows: list[Row]) -> str:
    """Say how much of full fine-tuning's (or LoRA's) score QLoRA keeps."""
    small, large = (_rows_of(rows, score) for score in (claim.second, claim.first))
    bits = small[0].train.bits if small[0].train else None
    who = f"{f'{bits}-bit ' if bits else ''}{_way(claim.second.method)}"
    other = _way(claim.first.method)
    return f"{_ratio(claim, who, other)}{_memory(small, large)}."


def _ratio(claim: MethodComparison, who: str, other: str) -> str:
    """Say which fraction of another score is retained, or that it cannot be measured."""
    if claim.ratio is None or claim.ratio_above_chance is None:
        return (
            f"{other} has {_points(claim.first.value)} points ({_over(claim.tasks)}), not "
            f"detectably above chance ({_points(claim.first.chance)}): how much of it {who} keeps "
            f"({_points(claim.second.value)} points) cannot be measured"
        )
    above = ""
    if claim.first.chance > 0:
        above = f"; {_percent(claim.ratio_above_chance)} of what is above chance"
    return (
        f"{who} keeps {_percent(claim.ratio, 'interval ')} of {other}'s {_over(claim.tasks)}"
        f"{above}: {_points(claim.second.value)} of {_points(claim.first.value)} points, chance "
        f"{_points(claim.first.chance)}; {_difference(claim)}"
    )


def _gain(claim: MethodComparison, methods: int) -> str:
    """Say what the best method adds to the base, and how it was picked."""
    who = _way(claim.second.method)
    if methods > 1:
        who += f", the best of {methods} methods (selected on these questions: biased upwards),"
    base, after = _points(claim.first.value), _points(claim.second.value)
    if claim.seen:
        verb = "lifts" if claim.delta > 0 else "lowers"
        sentence = f"{who} {verb} the untrained base from {base} to {after} points"
    else:
        sentence = f"{who} has {after} points, the untrained base {base}"
    floor = "" if claim.second.above_chance else f", which {after} is not detectably above"
    return (
        f"{sentence} ({_over(claim.tasks)}, chance {_points(claim.first.chance)}{floor}): "
        f"{_difference(claim)}."
    )


def _pruned(claim: MethodComparison, recovered: list[MethodComparison], rows: list[Row]) -> str:
    """Say what a pruned model retains, and what each recovery method regains."""
    cut = _rows_of(rows, claim.second)[0].pruned
    assert cut is not None  # of a pruned cell
    size = cut.parameters_after / cut.parameters_before
    back = [
        f"{_points(other.second.value)} after {other.second.method}"
        for other in recovered
        if other.first.method == claim.second.method
    ]
    words = [
        f"{other.second.method} {_difference(other)}"
        for other in recovered
        if other.first.method == claim.second.method
    ]
    name = claim.second.method
    then = f"; {_listed(back)} ({'; '.join(words)})" if back else ""
    return (
        f"pruned by {name}: {size:.0%} of the parameters; {_ratio(claim, 'it', 'the base')}{then}."
    )


def _difference(claim: MethodComparison) -> str:
    """Return a difference with its interval: its size only if it is significant."""
    low, high = claim.interval
    delta = f"{_signed(claim.delta)} (interval {_signed(low)} to {_signed(high)}"
    if claim.seen:
        return f"{delta}, corrected {_p(claim.p_holm)})"
    if claim.detectable is None:
        return f"no detectable difference, {delta}; too few questions to detect any)"
    return f"no detectable difference, {delta}, MDE {_points(claim.detectable)})"


def _memory(small: list[Row], large: list[Row]) -> str:
    """Return the fraction of training memory, as predicted: a measured one differs between runs."""
    peaks = [
        [row.train.predicted_peak_bytes for row in side if row.train] for side in (small, large)
    ]
    sizes = [[size for size in side if size] for side in peaks]
    if sizes != peaks:
        return ""
    return f"; {mean(sizes[0]) / mean(sizes[1]):.0%} of the training memory, as predicted"


def _rows_of(rows: list[Row], score: MethodScore) -> list[Row]:
    return [row for row in rows if row.name in score.cells]


def _alone(score: MethodScore) -> str:
    """Return a score that is compared with nothing but chance."""
    low, high = score.interval
    chance = f"chance {_points(score.chance)}"
    if not score.above_chance:
        chance = f"not detectably above {chance}"
    return (
        f"{_points(score.value)} points (95% interval {_points(low)} to {_points(high)}; {chance})"
    )


def _resolution(contrasts: list[Contrast], tasks: list[ReportTask]) -> str:
    """Say how small a true difference can be detected, for each task."""
    texts = []
    for task in tasks:
        sizes = [row.detectable for row in contrasts if row.task == task.task]
        finite = [size for size in sizes if size is not None]
        if sizes:
            size = f"{_points(median(finite))} points" if finite else "none"
            texts.append(f"{size} on {task.task} (n={task.questions.n:,})")
    tests = max(row.family for row in contrasts)
    level = f"{100 * (1 - LEVEL):.0f}%" + (f" over {tests} comparisons" if tests > 1 else "")
    return (
        f"Tests and intervals of differences are held to {level}. MDE, the true difference that "
        f"such a test detects in 4 of 5 cases: {_listed(texts)}. Smaller ones are often missed."
    )


def _way(method: str) -> str:
    return _WAYS.get(method, method if method != "base" else "the base")


def _over(tasks: list[str]) -> str:
    return f"mean of {len(tasks)} tasks" if len(tasks) > 1 else "score"


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _percent(ratio: tuple[float, tuple[float, float]], what: str = "") -> str:
    value, (low, high) = ratio
    return f"{value:.0%} ({what}{low:.0%} to {high:.0%})".replace("-", "−")


def _p(value: float) -> str:
    return "p < .001" if value < 0.001 else f"p = {value:.3f}".replace("0.", ".")


def _listed(items: list[str]) -> str:
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"
