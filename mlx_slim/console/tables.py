"""The tables that an evaluation and a comparison end with; they fit 80 columns.

Invariant: every figure has its standard error and its count beside it. Try it:
``mlx-slim eval --compare OUT_A OUT_B``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console as Terminal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mlx_slim.console.scoring import figure
from mlx_slim.evaluation.comparison import BITS, Comparison, MetricComparison
from mlx_slim.evaluation.figures import Figure
from mlx_slim.evaluation.records import EvalResults, TaskSection, TextSection, Timing
from mlx_slim.evaluation.results import TIMINGS_FILE
from mlx_slim.reading import JsonObject, read_object, short
from mlx_slim.units import human_bytes


def show_results(
    results: Sequence[JsonObject], folders: Sequence[Path], *, terminal: Terminal | None = None
) -> None:
    """Print one table a model: each task's metrics, counts, speed and peak memory.

    Args:
        results: As ``evaluate`` returns them.
        folders: Their folders, for the timings.
        terminal: Where to print; standard output by default.
    """
    terminal = terminal or Terminal(highlight=False)
    for values, folder in zip(results, folders, strict=True):
        result = EvalResults.read(values, short(folder))
        model = result.model + (f" + {result.adapter}" if result.adapter else "")
        chat = ", chat template" if result.settings.chat_template else ""
        chat += ", system message" if result.settings.system_instruction else ""
        table = Table(box=None, padding=(0, 1, 0, 0), title_justify="left", title_style="bold")
        table.title = escape(f"{model} ({result.settings.dtype}{chat})")
        for heading in ("task", "shots", "metric", "value ± stderr", "k/n", "tok/s", "peak"):
            side = "left" if heading in ("task", "metric") else "right"
            table.add_column(heading, justify=side, no_wrap=heading != "task", overflow="fold")
        timings = read_object(folder / TIMINGS_FILE, tasks=dict)["tasks"]
        for name, section in result.sections.items():
            timing = Timing.read(timings[name], short(folder / TIMINGS_FILE))
            speed = f"{timing.tokens_per_second:,.0f}"
            shots = section.questions.num_fewshot if isinstance(section, TaskSection) else None
            first = [name, "–" if shots is None else str(shots)]
            last = [speed, human_bytes(timing.peak_memory_bytes)]
            for label, metric, value, count in _figures(section):
                if label:
                    first = [f"  {label}", ""]
                table.add_row(*map(escape, [*first, metric, value, count, *last]))
                first, last = ["", ""], ["", ""]
        terminal.print(table)
        terminal.print(Text(f"{folder}", style="dim"), soft_wrap=True)


def _figures(section: TaskSection | TextSection) -> Iterator[tuple[str, str, str, str]]:
    """Yield label of a category (empty for the task itself), metric, value and count."""
    for metric, one in section.metrics.items():
        size = section.bytes if isinstance(section, TextSection) else None
        yield "", metric, figure(one.value, one.stderr), _count(one, section.n, size)
    if isinstance(section, TextSection):
        return
    for metric, one in (section.macro or {}).items():
        yield "", f"{metric}, macro", figure(one.value, one.stderr), ""
    for category, group in section.categories.items():
        for metric, one in group.micro.items():
            yield category, metric, figure(one.value, one.stderr), _count(one, group.n)


def _count(one: Figure, n: int, size: int | None = None) -> str:
    if one.k is not None:
        return f"{one.k:,}/{n:,}"
    return f"of {n:,}" if size is None else f"{size:,} B"


def show_comparison(comparison: Comparison, *, terminal: Terminal | None = None) -> None:
    """Print the paired table, a verdict a task, and what the reader should know."""
    terminal = terminal or Terminal(highlight=False)
    terminal.print(f"A  {comparison.first}\nB  {comparison.second}", markup=False)
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("task, metric", min_width=16, overflow="fold")
    for heading in ("A", "B", "B − A", "95% CI", "B+/A+", "p", "Holm"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = ""
    for row in comparison.rows:
        if row.task != before:
            table.add_row(escape(row.task))
        before = row.task
        table.add_row(*map(escape, [f"  {row.metric}", *_cells(row)]))
    terminal.print(table)
    for row in comparison.rows:
        if row.verdict:
            verb = f"B is {row.verdict}" if row.verdict[0] in "hl" else row.verdict
            chance = "" if row.chance is None else f"; chance level {100 * row.chance:.1f}"
            terminal.print(f"{row.task}: {verb}{chance}", markup=False, soft_wrap=True)
    for note in comparison.notes:
        terminal.print(f"note: {note}", markup=False, soft_wrap=True)
    terminal.print(
        f"CI: paired bootstrap, {comparison.draws:,} resamples, seed {comparison.seed} (text: "
        "Student's t over documents); p: exact McNemar (text: paired t); Holm: over the tasks; "
        "MDE: true difference that the corrected test flags with 80% power; B+/A+: right only in "
        "B, only in A",
        style="dim",
    )


def _cells(row: MetricComparison) -> list[str]:
    paired = row.paired
    scale, digits = (1, 4) if row.unit == BITS else (100, 2)
    # The bootstrap underestimates the spread of few documents; one question has none.
    interval_values = paired.interval if row.unit == BITS or paired.n < 2 else paired.bootstrap
    interval = "–"
    if interval_values is not None:
        low, high = (value * scale for value in interval_values)
        interval = f"{low:+.{digits}f}…{high:+.{digits}f}"
    flips = "" if row.unit == BITS else f"{paired.gained}/{paired.lost}"
    return [
        f"{paired.first * scale:.{digits}f}",
        f"{paired.second * scale:.{digits}f}",
        f"{paired.delta * scale:+.{digits}f}",
        interval,
        flips,
        f"{paired.p_value:.3g}",
        "" if row.p_holm is None else f"{row.p_holm:.3g}",
    ]
