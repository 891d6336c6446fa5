"""The phases of a search: score the original, rank candidates, recover and score the nearest.

Invariant: what is complete on disk is not repeated; verdicts are noted in ``rows`` as they fall.
Used by ``slimming/run.py``.

Shapes: N rows, T tokens a row.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_slim.artifacts import write_json
from mlx_slim.cluster.jobs import Job, Pool
from mlx_slim.cluster.pool import pool_of
from mlx_slim.config.schema import SourceConfig
from mlx_slim.data.sources import find
from mlx_slim.errors import SlimError, TimeLimitError
from mlx_slim.evaluation.scoring.loglikelihood import SCORING_BYTES
from mlx_slim.events import Notice, Observer
from mlx_slim.models.load import load, load_tokenizer, read_config
from mlx_slim.models.recorded_logits import RecordedLogits, free_weights
from mlx_slim.models.row_limits import row_limit
from mlx_slim.models.verified_save import compute_dtype
from mlx_slim.pruning.run import VALIDATION_LENGTH
from mlx_slim.quantization.calibration import DEFAULT_SOURCE, read_calibration
from mlx_slim.reading import read_object
from mlx_slim.runtime import memory_budget
from mlx_slim.slimming import build, proof, recovery
from mlx_slim.slimming.block_training import ROWS_FILE, trains_blocks, write_rows
from mlx_slim.slimming.candidate import Candidate
from mlx_slim.slimming.candidate_job import CandidateRequest, candidate_job
from mlx_slim.slimming.candidates import BITS, listed
from mlx_slim.slimming.folder import CANDIDATES, MODEL, SCORES, TARGETS
from mlx_slim.slimming.making import CandidateMaker, MakesHere, MakesInPool, check_sizes
from mlx_slim.slimming.material import Material
from mlx_slim.slimming.options import SlimOptions
from mlx_slim.slimming.questions import ModelAnswers, TaskPlan, answer, paired, plan_questions
from mlx_slim.slimming.records import CandidateRow, MeasuredSpeed
from mlx_slim.slimming.request import STATE_FILE, request_of, space_of
from mlx_slim.slimming.time_limit import TimeLimit
from mlx_slim.units import human_bytes

FEW = 3  # candidates that are recovered under a budget
_RANK_ROWS = 8  # of VALIDATION_LENGTH tokens
_FAILURES = 2  # sizes in a row that fall short of the score, which end a search without a budget
_SLACK = 4  # a job reserves a quarter more than it is predicted to need


class Search:
    """One search: what its phases share."""

    def __init__(self, source: str, out: Path, options: SlimOptions, observer: Observer) -> None:
        self.out, self.options, self.observer = out, options, observer
        began = time.perf_counter()
        self.space = space_of(source, options)
        self.original = self.space.original
        find(SourceConfig(path=options.data or DEFAULT_SOURCE))
        self.tasks = plan_questions(options)
        self.listed = listed(self.space, options)
        self.rows: dict[str, CandidateRow] = {
            one.key: CandidateRow(one, one.name(self.original)) for one in self.listed
        }
        self.material = Material(source, options.revision, options.data, out, out / TARGETS)
        self.base: list[ModelAnswers] = []
        self.time = TimeLimit(options.time, out / SCORES / "original", self.tasks, began)
        self.provable = 0.0
        self._rank_rows()  # unusable text is refused before anything is scored

    # ------------------------------------------------------------------------------------ phases

    def choose(self, descriptor: int) -> Candidate | None:
        """Return the winner on the selection questions; None if no candidate meets the demands.

        Args:
            descriptor: Of the lock of the search's folder, for processes.

        Raises:
            SlimError: If the claim questions cannot show the demanded fraction, or the workers
                cannot be used.
        """
        with self._maker(descriptor) as maker:
            if not (self.out / STATE_FILE).exists():
                write_json(self.out / STATE_FILE, request_of(self.material.source, self.options))
            self.say(f"{len(self.listed)} candidates; the original has {self._size(self.original)}")
            self.base = [self._original(plan) for plan in self.tasks]
            if warning := self.time.warning(1 + (FEW if self.options.has_budget else 1)):
                self.say(warning, "warning")
            self.provable = self._provable()
            self._rank()
            if not self.options.has_budget:
                return self._smallest_sufficient(maker)
            chosen = self._nearest()
            scored = [
                one
                for number, one in enumerate(chosen, 1)
                if self._score(maker, one, chosen[number:], len(chosen) - number + 1)
            ]
        return self._best_within(scored)  # speeds are measured where no job runs beside

    @contextlib.contextmanager
    def _maker(self, descriptor: int) -> Iterator[CandidateMaker]:
        """Yield who makes candidates.

        Raises:
            SlimError: If the workers cannot be used.
        """
        options = self.options
        if not options.several:
            yield MakesHere(self.scored)
            return
        budget = memory_budget("auto")
        with pool_of(self.out, descriptor, options, budget, self.say) as pool:
            check_sizes(self.listed, pool, self.out)
            apart = options.cluster is not None
            yield MakesInPool(pool, apart, self._is_scored, partial(self._job, pool))

    def say(self, text: str, level: str = "info") -> None:
        """Tell the observer."""
        self.observer.notify(Notice(text, level))

    def _size(self, one: Candidate) -> str:
        cost = one.cost
        return f"{human_bytes(cost.disk_bytes)} on disk, {human_bytes(cost.memory_bytes)} in memory"

    def _original(self, plan: TaskPlan) -> ModelAnswers:
        folder = self.out / "scores" / "original" / plan.name
        return answer(
            self.material.source,
            plan,
            folder,
            self.options.data_dir,
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
        pairs = paired(self.base, self.scored(rounded), selection=True)
        questions = [plan.claim for plan in self.tasks]
        provable = proof.provable(pairs, questions)
        score, named = 100 * proof.retention(pairs).first, " + ".join(map(str, questions))
        self.say(
            f"the original scores {score:.1f}% on the selection; {named} claim questions can "
            f"show {100 * provable:.1f}% of it at best, for a model as good as its 8-bit rounding"
        )
        fraction = self.options.keep_fraction
        if fraction is not None and fraction < 1 and not score:
            raise SlimError(
                "the original answers none of the selection questions right: no score to keep",
                "choose a task that it can do, or leave --keep out",
            )
        if fraction is not None and provable < fraction < 1:
            least, percentage = proof.needed(pairs, fraction), int(100 * provable)
            less = f", or demand less (--keep {percentage})" if percentage else ""
            raise SlimError(
                f"--keep {self.options.keep:g} cannot be shown with {named} claim questions, at "
                f"most {100 * provable:.1f}% can",
                f"ask {least:,} of each task for the claim (--limit {2 * least}) in a new folder"
                f"{less}",
            )
        return provable

    def _rank_rows(self) -> mx.array:
        """Return the rows (N, T) on which candidates are compared with the original."""
        source, revision = self.material.source, self.options.revision
        limit = row_limit(read_config(source, revision))
        return read_calibration(
            self.options.data or DEFAULT_SOURCE,
            load_tokenizer(source, revision=revision),
            length=min(VALIDATION_LENGTH, limit.tokens) if limit else VALIDATION_LENGTH,
            seen=0,
            validation=_RANK_ROWS,
            limit=limit,
        ).validation_NT

    def _rank(self) -> None:
        """Measure the distance of every candidate from the original, before any recovery."""
        missing = [one for one in self.listed if not self._ranked(one).exists()]
        if missing:
            revision, rows_NT = self.options.revision, self._rank_rows()
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
            self.note(one, kl=values["kl"], top1=values["top1"])

    def _ranked(self, one: Candidate) -> Path:
        return self.out / "ranked" / f"{one.key}.json"

    def note(self, one: Candidate, **values: object) -> None:
        """Set fields of the candidate's row."""
        self.rows[one.key] = replace(self.rows[one.key], **values)

    def _by_distance(self, among: Iterable[Candidate]) -> list[Candidate]:
        return sorted(among, key=lambda one: (self.rows[one.key].kl, one.key))

    def _nearest(self) -> list[Candidate]:
        """Return the candidates of a budget that are made: the nearest of each kind."""
        ranked = self._by_distance(self.listed)
        nearest = {one.kind: one for one in reversed(ranked)}
        chosen = self._by_distance(nearest.values())[:FEW]
        chosen += [one for one in ranked if one not in chosen][: FEW - len(chosen)]
        for one in ranked:
            if one not in chosen:
                self.note(one, verdict=f"not among the {len(chosen)} nearest before recovery")
        return chosen

    def _best_within(self, scored: list[Candidate]) -> Candidate | None:
        """Return the best of the scored candidates that are within the budget."""
        fitting = []
        for one in scored:
            self._measure_speed(one)
            row = self.rows[one.key]
            if row.speed and row.speed.generation_ratio < (self.options.speed or 0):
                self.note(one, verdict=f"{row.speed.generation_ratio:.2f} x the original's speed")
            elif self._too_large(row):
                self.note(one, verdict="its folder is over the budget")
            else:
                fitting.append(one)
        if not fitting:
            return None
        ranked = self._by_distance(self.listed)
        near = {one.key: -number for number, one in enumerate(ranked)}
        best = max(fitting, key=lambda one: (self._selected(one).second, near[one.key]))
        for one in fitting:
            if one != best:
                self.note(one, verdict="scores lower than the winner on the selection")
        return best

    def _too_large(self, row: CandidateRow) -> bool:
        disk = self.options.disk
        return disk is not None and row.disk_bytes is not None and row.disk_bytes > disk

    def _smallest_sufficient(self, maker: CandidateMaker) -> Candidate | None:
        """Return the smallest candidate that keeps the share on the selection questions.

        Sizes are tried from the largest down, the nearest to the original at each, until the share
        is not kept at two of them in a row.
        """
        fraction, best, failures = self.options.keep_fraction, None, 0
        assert fraction is not None
        rungs = _rungs(self.listed, self.original)
        nearest = [self._by_distance(rung)[0] for rung in rungs]
        for number, (one, rung) in enumerate(zip(nearest, rungs, strict=True), 1):
            for other in rung:
                if other != one:
                    self.note(other, verdict="farther from the original than another of its size")
            if failures == _FAILURES:
                self.note(one, verdict="smaller than two that do not keep the share")
                continue
            later = nearest[number : number + maker.most - 1]
            if not self._score(maker, one, later, 1):
                failures += 1
            elif self._selected(one).keeps(fraction):
                if best is not None:
                    self.note(best, verdict="keeps the share; a smaller one does too")
                best, failures = one, 0
            else:
                failures += 1
                least = self._selected(one).least
                self.note(one, verdict=f"only {100 * least:.1f}% is shown on the selection")
        return best

    def _score(
        self, maker: CandidateMaker, one: Candidate, later: Sequence[Candidate], left: int
    ) -> bool:
        """Have a candidate made and scored on the selection questions, and note its scores.

        Returns:
            Whether there was time to recover it.
        """
        try:
            maker.ensure(one, later, left)
        except TimeLimitError as error:
            self.say(f"{self.rows[one.key].name} is left out: {error.hint}", "warning")
            self.note(one, verdict="--time leaves too little to recover it")
            return False
        answers = self.scored(one)
        retention = proof.retention(paired(self.base, answers, selection=True))
        self.note(one, selection=retention)
        folder = self.folder(one)
        size = read_object(folder / build.SIZE, disk_bytes=int)["disk_bytes"]
        self.note(one, disk_bytes=size, recovered=build.recovered(one, folder))
        self.say(
            f"{self.rows[one.key].name}: {100 * retention.second:.1f}% on the selection, "
            f"{proof.percent(retention)} of the original's"
        )
        return True

    def _measure_speed(self, one: Candidate) -> None:
        """Measure the speed of a candidate beside the original's, where one is demanded."""
        if self.options.speed is None:
            return
        folder = self.folder(one)
        file = folder / "speed.json"
        if not file.exists():
            source, revision = self.material.source, self.options.revision
            write_json(file, asdict(build.speed_beside(source, folder / MODEL, revision)))
        self.note(one, speed=MeasuredSpeed(**read_object(file)))

    def _selected(self, one: Candidate) -> proof.Retention:
        retention = self.rows[one.key].selection
        assert retention is not None
        return retention

    def folder(self, one: Candidate) -> Path:
        """Return the folder that the candidate is made in."""
        return self.out / CANDIDATES / one.key

    def scored(self, one: Candidate, left: int = 1, *, whole: bool = False) -> list[ModelAnswers]:
        """Return a candidate's answers, made and scored where that was not done."""
        folder = self.folder(one)
        if not self._is_scored(one, whole=whole):
            self._prepare(one, left)
            build.make(self.material, one, folder, self.observer)
        scores, data_dir = self._scores(one, whole), self.options.data_dir
        return [
            answer(folder / MODEL, plan, scores / plan.name, data_dir, self.observer, whole=whole)
            for plan in self.tasks
        ]

    def _scores(self, one: Candidate, whole: bool) -> Path:
        return self.out / ("claim" if whole else SCORES) / one.key

    def _is_scored(self, one: Candidate, whole: bool = False) -> bool:
        """Return whether a candidate is made, and has answered all questions."""
        folder, scores = self.folder(one), self._scores(one, whole)
        answered = all((scores / plan.name / "results.json").exists() for plan in self.tasks)
        weights = any((folder / MODEL).glob("*.safetensors"))
        return answered and weights and (folder / build.SIZE).exists()

    def _prepare(self, one: Candidate, left: int, budget: int | None = None) -> None:
        """Make the folder of a candidate, and choose how it recovers, where that was not done."""
        folder = self.folder(one)
        folder.mkdir(parents=True, exist_ok=True)
        if recovery.recovers(one) and not (folder / recovery.RECIPE).exists():
            config, limits = self.space.config_of(one.cuts), self.time.recoveries(left)
            recovery.write_recipe(self.material, one, folder, config, limits=limits, budget=budget)
        if trains_blocks(one) and not (folder / ROWS_FILE).exists():
            why = write_rows(self.material, one, folder, self.time.recoveries(left))
            if why:
                self.say(f"{self.rows[one.key].name} is rounded, not trained: {why}", "warning")

    def _job(self, pool: Pool, one: Candidate, left: int) -> Job:
        """Return the process of a candidate: it reserves what its largest step needs, and more."""
        self._prepare(one, left, pool.budget)
        stored = compute_dtype() or self.space.dtype
        needed = self.original.cost.parameters * stored.size + SCORING_BYTES
        if recovery.recovers(one):
            config = self.space.config_of(one.cuts)
            needed = max(needed, recovery.peak_bytes(self.folder(one), config))
        memory = min(pool.budget, needed + needed // _SLACK)
        data_dir = self.options.data_dir
        request = CandidateRequest(
            source=self.material.source,
            revision=self.material.revision,
            data=self.material.data,
            data_dir=None if data_dir is None else str(data_dir),
            candidate=one,
            tasks=tuple(self.tasks),
        )
        self.say(f"── {self.rows[one.key].name}")
        return candidate_job(self.out, request, memory, far=pool.far)


def _rungs(candidates: list[Candidate], original: Candidate) -> list[list[Candidate]]:
    """Return groups of candidates of about a size, the largest first."""
    rungs: list[list[Candidate]] = []
    for one in candidates:  # largest first
        if rungs and one.cost.disk_bytes > 0.9 * rungs[-1][0].cost.disk_bytes:
            rungs[-1].append(one)
        else:
            rungs.append([one])
    return rungs
