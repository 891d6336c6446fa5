"""The end of a search: the claim on questions that chose nothing, its headline, its commands.

Invariant: only the original and the winner answer the claim questions, once. Used by
``slimming/run.py``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mlx_slim.artifacts import SCHEMA_VERSION, provenance, public_name
from mlx_slim.cluster.machines import kind_of, machine
from mlx_slim.reading import read_object
from mlx_slim.slimming import proof
from mlx_slim.slimming.block_training import LENGTH, rows_of
from mlx_slim.slimming.build import SIZE
from mlx_slim.slimming.candidate import Candidate
from mlx_slim.slimming.folder import MODEL
from mlx_slim.slimming.forgotten import bits_per_byte, general_text
from mlx_slim.slimming.questions import paired
from mlx_slim.slimming.records import SlimReport, TaskClaim
from mlx_slim.slimming.recovery import RECIPE, recipe_of
from mlx_slim.slimming.request import request_of
from mlx_slim.slimming.search import Search
from mlx_slim.units import human_bytes

_KIND = {
    "depth": ("--axis", "depth"),
    "width": ("--axis", "width"),
    "hidden": ("--axis", "width", "--hidden"),
    "experts": ("--method", "reap"),
}


def conclude(search: Search, winner: Candidate | None) -> SlimReport:
    """Test the claim about the winner, and return the report.

    Args:
        search: Whose candidates are scored on the selection questions.
        winner: The chosen candidate; None if none meets the demands.
    """
    notes: list[str] = []
    claim, tasks, forgotten, commands = None, [], None, []
    text = general_text(search.options.data_dir)
    if winner is not None:
        answers = search.scored(winner, whole=True)
        pairs = paired(search.base, answers, selection=False)
        claim, tasks = proof.retention(pairs), [task_claim(pair) for pair in pairs]
        if text is None:
            notes.append(
                "what was forgotten is not measured: the data mirror has no general text (wikitext)"
            )
        else:
            forgotten = _forgotten(search, winner, text)
        commands = commands_again(search, winner)
        search.note(winner, verdict="chosen")
    notes += mixed_machines(search)
    demand_met = None
    if search.options.keep_fraction is not None:
        demand_met = claim is not None and claim.keeps(search.options.keep_fraction)
    report = SlimReport(
        schema_version=SCHEMA_VERSION,
        source=public_name(search.material.source),
        revision=search.options.revision,
        options={
            **request_of("", search.options),
            "source": None,
            "data": None if search.options.data is None else public_name(search.options.data),
            "keep": search.options.keep,
            "questions": {plan.name: (plan.limit, plan.half) for plan in search.tasks},
        },
        original=search.original,
        questions={plan.name: (plan.selection, plan.claim) for plan in search.tasks},
        provable=search.provable,
        rows=[search.rows[one.key] for one in search.listed],
        winner=None if winner is None else winner.key,
        claim=claim,
        tasks=tasks,
        demand_met=demand_met,
        headline="",
        forgotten=forgotten,
        forgotten_text="" if text is None else text.name,
        commands=commands,
        notes=notes,
        provenance=provenance(),
    )
    return replace(report, headline=headline(report))


def mixed_machines(search: Search) -> list[str]:
    """Return a note where scores that were compared are of several kinds of machine."""
    kinds = {kind_of(machine()): ["original"]}
    for row in search.rows.values():
        if row.selection is not None:
            size = read_object(search.folder(row.candidate) / SIZE)
            where = size.get("provenance") or machine()  # earlier versions stored none
            kinds.setdefault(kind_of(where), []).append(row.candidate.key)
    if len(kinds) < 2:
        return []
    where = "; ".join(f"{', '.join(names)}: {kind}" for kind, names in kinds.items())
    return [f"scores are of {len(kinds)} kinds of machine, whose last digits may differ: {where}"]


def headline(report: SlimReport) -> str:
    """Return the result of a search in one line; the report's own is not read."""
    keep, original = report.options["keep"], report.original
    budget = any(report.options[name] is not None for name in ("memory", "disk", "speed"))
    if report.winner is None or report.claim is None:
        scored = [row for row in report.rows if row.selection is not None]
        if not scored:
            size = human_bytes(original.cost.disk_bytes)
            meets = " and meets the budget" if budget else ""
            if report.rows:
                return "none of the candidates was made: --time leaves too little to recover one"
            return f"no candidate is smaller: the original has {size} on disk{meets}"
        nearest = max(scored, key=lambda row: row.selection.least if row.selection else 0)
        assert nearest.selection is not None
        if budget:
            return (
                f"none of the {len(scored)} candidates that were made meets the budget: the "
                f"nearest is {nearest.name}: {nearest.verdict}; the original stays"
            )
        return (
            f"none of the {len(report.rows)} candidates is shown to keep {keep:g}%: the nearest is "
            f"{nearest.name}, {proof.percent(nearest.selection)}; the original stays"
        )
    row = next(row for row in report.rows if row.candidate.key == report.winner)
    ratio = (row.disk_bytes or row.candidate.cost.disk_bytes) / original.cost.disk_bytes
    text = (
        f"{row.name}: {ratio:.0%} of the bytes, {proof.percent(report.claim)} of the score on "
        f"{report.claim.n:,} questions that chose nothing"
    )
    if report.demand_met is None:
        return text
    verb = "keeps" if report.demand_met else "is not shown to keep"
    return f"{text}: {verb} {keep:g}%"


def _forgotten(search: Search, winner: Candidate, text: Path) -> tuple[float, float]:
    """Return bits per byte of the general text, of the original and of the winner."""
    places = (
        ("original", search.material.source, search.options.revision),
        (winner.key, str(search.folder(winner) / MODEL), None),
    )
    before, after = (
        bits_per_byte(model, text, search.out / "text" / name, search.observer, revision)
        for name, model, revision in places
    )
    return before, after


def commands_again(search: Search, winner: Candidate) -> list[list[str]]:
    """Return the command lines that make the winner again."""
    words, source, folder = [], search.material.source, search.folder(winner)
    layers = search.original.layers
    calibration = ["--calibration", search.options.data] if search.options.data else []
    revision = search.options.revision
    of_source = [] if revision is None else ["--revision", revision]  # what is cut already has none
    for index, cut in enumerate(winner.cuts):
        out = str(folder / f"pruned-{index + 1}")
        size = ["--target-params", str(cut.target)]
        if cut.axis == "depth":
            size = ["--ratio", f"{cut.layers / layers:.6g}"]
        prune = ["mlx-slim", "prune", source, "-o", out, *_KIND[cut.axis], *size]
        words.append([*prune, *calibration, *of_source])
        source, of_source = out, []
    again = search.out / "again"
    if (folder / RECIPE).exists():
        words.append(["mlx-slim", "distill", str(folder / RECIPE), "-o", str(again)])
        if recipe_of(folder).recipe.method != "full":  # what it leaves is an adapter
            adapter, fused = str(again / "adapters"), str(search.out / "again-fused")
            fuse = ["mlx-slim", "fuse", source, "--adapter", adapter, "-o", fused]
            words.append([*fuse, *calibration, *of_source])
    elif winner.bits is not None:
        words.append(
            [
                "mlx-slim",
                "quantize",
                source,
                *_bits(winner),
                *_training(folder),
                *(calibration if rows_of(folder) else []),
                *of_source,
                "-o",
                str(again),
            ]
        )
    return words


def task_claim(pair: proof.PairedAnswers) -> TaskClaim:
    """Return one task's part of the claim."""
    statistics = proof.paired(pair)
    interval = statistics.interval or (-1.0, 1.0)
    return TaskClaim(
        pair.task,
        pair.metric,
        statistics.n,
        statistics.first,
        statistics.second,
        statistics.delta,
        interval,
        pair.chance,
    )


def _bits(winner: Candidate) -> list[str]:
    """Return the options of ``quantize`` that give the winner's bits."""
    if winner.bits_per_weight is None:
        return ["--bits", str(winner.bits)]
    return ["--bits-per-weight", f"{winner.bits_per_weight:g}", "--sensitivity", "rules"]


def _training(folder: Path) -> list[str]:
    """Return the options of ``quantize`` that train blocks, where the winner's were trained."""
    if not (rows := rows_of(folder)):
        return []
    seen = ["--calibration-samples", str(rows), "--calibration-length", str(LENGTH)]
    return ["--method", "blockwise", *seen]
