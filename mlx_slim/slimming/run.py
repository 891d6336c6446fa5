"""Search for the smallest model that keeps its score, or the best within a budget, and prove it.

Invariant: a phase that is complete on disk is not repeated, so a kill loses at most the work on one
candidate; the claim is tested on questions that chose nothing; ``slim.json`` is written last, and
``model/`` is the winner. Try it: ``mlx-slim slim MODEL -o DIR --disk 200MB --task arc_easy``.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from mlx_slim.artifacts import SCHEMA_VERSION, provenance, public_name, write_json
from mlx_slim.config.schema import SourceConfig
from mlx_slim.data.sources import find
from mlx_slim.errors import SlimError
from mlx_slim.events import Notice, Observer
from mlx_slim.models.load import load, load_tokenizer, read_config, resolve
from mlx_slim.models.recorded_logits import RecordedLogits, free_weights
from mlx_slim.models.row_limits import row_limit
from mlx_slim.models.tensors import folder_tensors
from mlx_slim.models.verified_save import compute_dtype, stored_dtype
from mlx_slim.pruning.run import VALIDATION_LENGTH
from mlx_slim.quantization.apply import refuse_quantized
from mlx_slim.quantization.calibration import DEFAULT_SOURCE, read_calibration
from mlx_slim.reading import JsonObject, library_errors, read_object
from mlx_slim.run_dir import RunDir, RunKind
from mlx_slim.runtime import human_bytes, human_seconds
from mlx_slim.slimming import build, proof
from mlx_slim.slimming.candidates import BITS, Candidate, Space, listed
from mlx_slim.slimming.cost import other_bytes
from mlx_slim.slimming.forgotten import bits_per_byte, general_text
from mlx_slim.slimming.options import SlimOptions, check
from mlx_slim.slimming.questions import Answers, TaskPlan, answer, paired, plan_questions
from mlx_slim.slimming.records import Row, SlimReport, TaskClaim

STATE_FILE, REPORT_FILE = "request.json", "slim.json"
MODEL = "model"
RUN = RunKind(command="slim", holds="search", state=STATE_FILE)
FEW = 3  # candidates that are recovered under a budget
_RANK_ROWS = 8  # of VALIDATION_LENGTH tokens
_FAILURES = 2  # sizes in a row at which the score is not kept, that end a search without a budget
_CLAIM_TIME = 0.15  # of the time that is left: for scoring
_FIXED = ("context", "kv_bits", "tasks", "limit", "data", "revision", "memory", "disk", "speed")


def slim(
    source: str | Path,
    out: Path,
    options: SlimOptions,
    observer: Observer,
    *,
    resume: bool = False,
) -> SlimReport:
    """Search the folder ``out`` full; return its report.

    Args:
        source: Dense model, folder or hub id.
        out: The folder; must be new unless ``resume``.
        options: Budget, demand and tasks.
        observer: Gets every event.
        resume: Resume a search that was started with the same demands.

    Raises:
        SlimError: Bad input, a budget that nothing meets, or a share that cannot be proved.
        ResourceError: Not enough memory or disk.
        Interrupted: Ctrl-C; what is complete is kept.
    """
    check(options)
    match = partial(_check_same, out, source, options)
    with RunDir(out, RUN).claim(resume=resume, match=match) as claimed:
        if claimed.note:
            observer.notify(Notice(claimed.note))
        if (out / REPORT_FILE).exists():
            observer.notify(Notice(f"{out} is complete: nothing to do"))
            report = read_report(out)
            finish(out, report.winner)
            return report
        with RunDir(out, RUN).resumable(partial(command_words, source, options)):
            return _Search(str(source), out, options, observer).run()


def read_report(folder: Path) -> SlimReport:
    """Return the report of a finished search.

    Raises:
        SlimError: If it is damaged.
    """
    values = read_object(folder / REPORT_FILE)
    with library_errors(f"{folder / REPORT_FILE} is damaged", "search again"):
        return SlimReport.from_json(values)


def space_of(source: str | Path, options: SlimOptions) -> Space:
    """Return the smaller models of ``source``; no weight is read.

    Raises:
        SlimError: If it is quantized, or not there.
    """
    config = read_config(source, options.revision)
    if "quantization" in config:
        import mlx.nn as nn

        refuse_quantized(nn.Module(), config)
    folder = resolve(source, options.revision)
    return Space(config, stored_dtype(folder_tensors(folder)), options, other_bytes(folder))


def command_words(source: str | Path, options: SlimOptions) -> list[str]:
    """Return the command that started a search, without its folder."""
    words = ["slim", str(source)]
    plain = SlimOptions()
    for name in ("memory", "disk", "speed", "context", "kv_bits", "keep", "limit", "data"):
        value = getattr(options, name)
        if value != getattr(plain, name):
            words += [
                f"--{name.replace('_', '-')}",
                f"{value:g}" if isinstance(value, float) else str(value),
            ]
    for task in options.tasks:
        words += ["--task", task]
    if options.data_dir is not None:
        words += ["--data-dir", str(options.data_dir)]
    if options.time is not None:
        words += ["--time", f"{options.time:g}s"]
    return [*words, *(["--revision", options.revision] if options.revision else [])]


def _request(source: str | Path, options: SlimOptions) -> JsonObject:
    values = asdict(options)
    return {
        "schema_version": SCHEMA_VERSION,
        "source": str(source),
        **{name: list(v) if isinstance(v := values[name], tuple) else v for name in _FIXED},
    }


def _check_same(out: Path, source: str | Path, options: SlimOptions) -> None:
    old, new = read_object(out / STATE_FILE), _request(source, options)
    changed = [
        f"{key}: {old.get(key)!r} → {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise SlimError(
            f"{out} was started with other demands: {'; '.join(changed)}",
            "resume with the same values, or start a new search",
        )


class _Search:
    """One search: what its phases share."""

    def __init__(self, source: str, out: Path, options: SlimOptions, observer: Observer) -> None:
        self.out, self.options, self.observer = out, options, observer
        self.began = time.perf_counter()
        self.space = space_of(source, options)
        self.original = self.space.original
        find(SourceConfig(path=options.data or DEFAULT_SOURCE))
        self.tasks = plan_questions(options)
        self.listed = listed(self.space, options)
        self.rows: dict[str, Row] = {
            one.key: Row(one, one.name(self.original)) for one in self.listed
        }
        self.material = build.Material(source, options.revision, options.data, out)
        self.notes: list[str] = []
        if not (out / STATE_FILE).exists():
            write_json(out / STATE_FILE, _request(source, options))

    # ------------------------------------------------------------------------------------ phases

    def run(self) -> SlimReport:
        self.say(f"{len(self.listed)} candidates; the original has {self._size(self.original)}")
        self.base = [self._original(plan) for plan in self.tasks]
        provable = self._provable()
        self._rank()
        winner = self._best_within() if self.options.has_budget else self._smallest_kept()
        report = self._conclude(winner, provable)
        write_json(self.out / REPORT_FILE, report.as_json())
        self._clear(winner)
        return read_report(self.out)

    def say(self, text: str, level: str = "info") -> None:
        self.observer.notify(Notice(text, level))

    def _size(self, one: Candidate) -> str:
        cost = one.cost
        return f"{human_bytes(cost.disk_bytes)} on disk, {human_bytes(cost.memory_bytes)} in memory"

    def _original(self, plan: TaskPlan) -> Answers:
        folder = self.out / "scores" / "original" / plan.name
        return answer(
            self.material.source,
            plan,
            folder,
            self.options,
            self.observer,
            whole=True,
            revision=self.options.revision,
        )

    def _provable(self) -> float:
        """Say, and return, what the claim questions can show; refuse more.

        Raises:
            SlimError: With the questions that would do.
        """
        rounded = self.space.candidate(BITS[0], ())
        pairs = paired(self.base, self._scored(rounded), selection=True)
        questions = [plan.claim for plan in self.tasks]
        provable = proof.provable(pairs, questions)
        score, named = 100 * proof.share_kept(pairs).first, " + ".join(map(str, questions))
        self.say(
            f"the original scores {score:.1f}% on the selection; {named} claim questions can "
            f"show {100 * provable:.1f}% of it at best, for a model as good as its 8-bit rounding"
        )
        share = self.options.share
        if share is not None and provable < share < 1:
            least = proof.needed(pairs, share)
            raise SlimError(
                f"--keep {self.options.keep:g} cannot be shown with {named} claim questions, at "
                f"most {100 * provable:.1f}% can",
                f"ask {least:,} of each task for the claim (--limit {2 * least}) in a new folder, "
                f"or demand less (--keep {int(100 * provable)})",
            )
        return provable

    def _rank(self) -> None:
        """Measure the distance of every candidate from the original, before any recovery."""
        missing = [one for one in self.listed if not self._ranked(one).exists()]
        if missing:
            source = self.options.data or DEFAULT_SOURCE
            revision = self.options.revision
            config = read_config(self.material.source, revision)
            rows_NT = read_calibration(
                source,
                load_tokenizer(self.material.source, revision=revision),
                length=min(VALIDATION_LENGTH, limit.tokens)
                if (limit := row_limit(config))
                else VALIDATION_LENGTH,
                seen=0,
                validation=_RANK_ROWS,
                limit=limit,
            ).validation_NT
            dense = load(self.material.source, revision=revision, dtype=compute_dtype())
            dense.model.eval()
            original = RecordedLogits(dense.model, rows_NT, self.out)
            free_weights(dense.model)
            del dense
            for number, one in enumerate(missing, 1):
                measured = build.distance(self.material, one, original, rows_NT)
                write_json(self._ranked(one), {"kl": measured.kl, "top1": measured.top1})
                self.say(
                    f"{number} of {len(missing)}: {self.rows[one.key].name}: "
                    f"KL {measured.kl:.3f} nats before recovery"
                )
        for one in self.listed:
            values = read_object(self._ranked(one), kl=float, top1=float)
            self._note(one, kl=values["kl"], top1=values["top1"])

    def _ranked(self, one: Candidate) -> Path:
        return self.out / "ranked" / f"{one.key}.json"

    def _note(self, one: Candidate, **values: object) -> None:
        self.rows[one.key] = replace(self.rows[one.key], **values)

    def _by_distance(self, among: Iterable[Candidate]) -> list[Candidate]:
        return sorted(among, key=lambda one: (self.rows[one.key].kl, one.key))

    def _best_within(self) -> Candidate | None:
        """Return the best scored candidate of the budget: the nearest of each kind, recovered."""
        ranked = self._by_distance(self.listed)
        nearest = {one.kind: one for one in reversed(ranked)}
        chosen = self._by_distance(nearest.values())[:FEW]
        chosen += [one for one in ranked if one not in chosen][: FEW - len(chosen)]
        for one in ranked:
            if one not in chosen:
                self._note(one, verdict=f"not among the {len(chosen)} nearest before recovery")
        fitting = []
        for number, one in enumerate(chosen):
            self._score(one, len(chosen) - number)
            row = self.rows[one.key]
            if row.speed and row.speed.generation_ratio < (self.options.speed or 0):
                self._note(one, verdict=f"{row.speed.generation_ratio:.2f} x the original's speed")
            elif self._too_large(row):
                self._note(one, verdict="its folder is over the budget")
            else:
                fitting.append(one)
        if not fitting:
            return None
        near = {one.key: -number for number, one in enumerate(ranked)}
        best = max(fitting, key=lambda one: (self._selected(one).second, near[one.key]))
        for one in fitting:
            if one != best:
                self._note(one, verdict="scores lower than the winner on the selection")
        return best

    def _too_large(self, row: Row) -> bool:
        disk = self.options.disk
        return disk is not None and row.disk_bytes is not None and row.disk_bytes > disk

    def _smallest_kept(self) -> Candidate | None:
        """Return the smallest candidate that keeps the share on the selection questions.

        Sizes are tried from the largest down, the nearest to the original at each, until the share
        is not kept at two of them in a row.
        """
        share, best, failures = self.options.share, None, 0
        assert share is not None
        for rung in _rungs(self.listed, self.original):
            one = self._by_distance(rung)[0]
            for other in rung:
                if other != one:
                    self._note(other, verdict="farther from the original than another of its size")
            if failures == _FAILURES:
                self._note(one, verdict="smaller than two that do not keep the share")
                continue
            self._score(one, 1)
            if self._selected(one).keeps(share):
                if best is not None:
                    self._note(best, verdict="keeps the share; a smaller one does too")
                best, failures = one, 0
            else:
                failures += 1
                least = self._selected(one).least
                self._note(one, verdict=f"only {100 * least:.1f}% is shown on the selection")
        return best

    def _score(self, one: Candidate, left: int) -> None:
        """Make a candidate and score it on the selection questions; ``left`` share the time."""
        answers = self._scored(one, left)
        share = proof.share_kept(paired(self.base, answers, selection=True))
        self._note(one, selection=share)
        folder = self._folder(one)
        if (folder / "recover.yaml").exists():
            self._note(one, recovered=build.recovery_of(folder).recipe.method)
        size = read_object(folder / "size.json", disk_bytes=int)["disk_bytes"]
        self._note(one, disk_bytes=size)
        if self.options.speed is not None:
            file = folder / "speed.json"
            if not file.exists():
                speed = build.speed_beside(
                    self.material.source, folder / MODEL, self.options.revision
                )
                write_json(file, asdict(speed))
            self._note(one, speed=build.Speed(**read_object(file)))
        self.say(
            f"{self.rows[one.key].name}: {100 * share.second:.1f}% on the selection, "
            f"{_percent(share)} of the original's"
        )

    def _selected(self, one: Candidate) -> proof.Share:
        share = self.rows[one.key].selection
        assert share is not None
        return share

    def _folder(self, one: Candidate) -> Path:
        return self.out / "candidates" / one.key

    def _scored(self, one: Candidate, left: int = 1, *, whole: bool = False) -> list[Answers]:
        """Return a candidate's answers, made and scored where that was not done."""
        folder = self._folder(one)
        scores = self.out / ("claim" if whole else "scores") / one.key
        complete = all((scores / plan.name / "results.json").exists() for plan in self.tasks)
        if not (complete and (folder / "size.json").exists()):
            folder.mkdir(parents=True, exist_ok=True)
            build.make(self.material, one, folder, self.observer, seconds=self._seconds(left))
            files = [path for path in (folder / MODEL).iterdir() if path.is_file()]
            size = sum(path.stat().st_size for path in files)
            write_json(folder / "size.json", {"disk_bytes": size})
        return [
            answer(
                folder / MODEL, plan, scores / plan.name, self.options, self.observer, whole=whole
            )
            for plan in self.tasks
        ]

    def _seconds(self, left: int) -> float | None:
        """Return the time of one of ``left`` recoveries; None without a limit."""
        if self.options.time is None:
            return None
        remaining = self.options.time - (time.perf_counter() - self.began)
        return max(60.0, remaining * (1 - _CLAIM_TIME) / left)

    # ------------------------------------------------------------------------------------- claim

    def _conclude(self, winner: Candidate | None, provable: float) -> SlimReport:
        share, tasks, forgotten, commands = None, [], None, []
        text = general_text(self.options.data_dir)
        if winner is not None:
            answers = self._scored(winner, whole=True)
            pairs = paired(self.base, answers, selection=False)
            share, tasks = proof.share_kept(pairs), [task_claim(pair) for pair in pairs]
            forgotten = self._forgotten(winner, text)
            commands = self._commands(winner)
            self._note(winner, verdict="chosen")
        kept = None
        if self.options.share is not None:
            kept = share is not None and share.keeps(self.options.share)
        return SlimReport(
            schema_version=SCHEMA_VERSION,
            source=public_name(self.material.source),
            revision=self.options.revision,
            options={
                **_request("", self.options),
                "source": None,
                "data": None if self.options.data is None else public_name(self.options.data),
                "keep": self.options.keep,
                "questions": {plan.name: (plan.limit, plan.half) for plan in self.tasks},
            },
            original=self.original,
            questions={plan.name: (plan.selection, plan.claim) for plan in self.tasks},
            provable=provable,
            rows=[self.rows[one.key] for one in self.listed],
            winner=None if winner is None else winner.key,
            claim=share,
            tasks=tasks,
            kept=kept,
            headline=self._headline(winner, share, kept),
            forgotten=forgotten,
            forgotten_text="" if text is None else text.name,
            commands=commands,
            notes=self.notes,
            provenance=provenance(),
        )

    def _headline(
        self, winner: Candidate | None, share: proof.Share | None, kept: bool | None
    ) -> str:
        if winner is None or share is None:
            scored = [row for row in self.rows.values() if row.selection is not None]
            if not scored:
                return "no candidate is smaller than the original"
            nearest = max(scored, key=lambda row: row.selection.least if row.selection else 0)
            assert nearest.selection is not None
            what = "the demanded speed" if self.options.speed else f"{self.options.keep:g}%"
            return (
                f"none of the {len(self.rows)} candidates is shown to keep {what}: the nearest is "
                f"{nearest.name}, {_percent(nearest.selection)}; the original stays"
            )
        row = self.rows[winner.key]
        ratio = (row.disk_bytes or winner.cost.disk_bytes) / self.original.cost.disk_bytes
        text = (
            f"{row.name}: {ratio:.0%} of the bytes, {_percent(share)} of the score on "
            f"{share.n:,} questions that chose nothing"
        )
        if kept is None:
            return text
        verb = "keeps" if kept else "is not shown to keep"
        return f"{text}: {verb} {self.options.keep:g}%"

    def _forgotten(self, winner: Candidate, text: Path | None) -> tuple[float, float] | None:
        if text is None:
            self.notes.append(
                "what was forgotten was not measured: no text of another kind (wikitext in the "
                "data mirror)"
            )
            return None
        before, after = (
            bits_per_byte(model, text, self.out / "text" / name, self.observer, revision)
            for name, model, revision in (
                ("original", self.material.source, self.options.revision),
                (winner.key, str(self._folder(winner) / MODEL), None),
            )
        )
        return before, after

    def _commands(self, winner: Candidate) -> list[list[str]]:
        """Return the command lines that make the winner again."""
        words, source, folder = [], self.material.source, self._folder(winner)
        layers = self.original.layers
        calibration = ["--calibration", self.options.data] if self.options.data else []
        for index, cut in enumerate(winner.cuts):
            out = str(folder / f"pruned-{index + 1}")
            size = ["--target-params", str(cut.target)]
            if cut.axis == "depth":
                size = ["--ratio", f"{cut.layers / layers:.6g}"]
            words.append(
                ["mlx-slim", "prune", source, "-o", out, "--axis", cut.axis, *size, *calibration]
            )
            source = out
        if (folder / "recover.yaml").exists():
            words.append(
                ["mlx-slim", "distill", str(folder / "recover.yaml"), "-o", str(self.out / "again")]
            )
        elif winner.bits is not None:
            words.append(
                [
                    "mlx-slim",
                    "quantize",
                    source,
                    "--bits",
                    str(winner.bits),
                    "-o",
                    str(self.out / "again"),
                ]
            )
        return words

    def _clear(self, winner: Candidate | None) -> None:
        """Move the winner to ``model/``, and remove what no file of the report needs."""
        finish(self.out, None if winner is None else winner.key)
        self.say(f"took {human_seconds(time.perf_counter() - self.began)}")


def finish(out: Path, winner: str | None) -> None:
    """Move the winner's weights to ``model/``; remove those of the others."""
    if winner is not None and not (out / MODEL).exists():
        (out / "candidates" / winner / MODEL).rename(out / MODEL)
    for folder in (out / "candidates").glob("*"):
        for name in (MODEL, "pruned-1", "pruned-2", "recover"):
            if name != "recover":
                shutil.rmtree(folder / name, ignore_errors=True)
            else:
                shutil.rmtree(folder / name / "checkpoints", ignore_errors=True)
    shutil.rmtree(out / "targets", ignore_errors=True)


def _rungs(candidates: list[Candidate], original: Candidate) -> list[list[Candidate]]:
    """Return candidates of about a size together, the largest first."""
    rungs: list[list[Candidate]] = []
    for one in candidates:  # largest first
        if rungs and one.cost.disk_bytes > 0.9 * rungs[-1][0].cost.disk_bytes:
            rungs[-1].append(one)
        else:
            rungs.append([one])
    return rungs


def _percent(share: proof.Share) -> str:
    if share.value is None or share.interval is None:
        return "an unknown share"
    low, high = share.interval
    return f"{100 * share.value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def task_claim(pair: proof.Pair) -> TaskClaim:
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
