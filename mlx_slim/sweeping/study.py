"""The trials of a sweep in an Optuna study (SQLite), and what is proposed next.

Invariant: proposals and prunings are a function of the seed and the trials before: sampler and
pruner are made anew for each trial from (seed, number), over a study in memory that repeats the
trials so far under their own numbers. So a killed and resumed sweep of one worker proposes what the
undisturbed one does. The file is the record: a trial that a kill left running is marked failed
there, and its parameters are queued again under the same number. Several workers: what has ended by
then decides what is proposed.

Optuna is imported here alone, and this module only by what searches or reads a search. Try it:
``mlx-slim sweep sweep-smollm2-lora --space space-smollm2-lora -o runs/sweep``.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from mlx_slim.artifacts import atomic_file
from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.reading import JsonObject, one_line
from mlx_slim.sweeping.options import LOSS, SweepOptions
from mlx_slim.sweeping.records import (
    Curve,
    PastTrial,
    TrialOutcome,
    TrialRequest,
    TrialRow,
    from_json,
    to_json,
)
from mlx_slim.sweeping.space import Parameter, Point

_NAME = "sweep"  # of the study: Hyperband draws a trial's bracket from it and the number
_ANEW = "start a new sweep"
_LEAST_FOR_IMPORTANCES = 8  # complete trials
optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class Proposal:
    """A trial to run: its number, its values, and how often it was started before."""

    number: int
    values: Point
    attempt: int = 0


@dataclass(frozen=True)
class StudyPlan:
    """What decides the proposals.

    Attributes:
        parameters: Of the space.
        options: Objectives, seed, pruner, workers.
        queue: Points that are tried first, in order.
        least_steps: Steps between two validations: the least that Hyperband gives.
    """

    parameters: tuple[Parameter, ...]
    options: SweepOptions
    queue: tuple[Point, ...] = ()
    least_steps: int = 1

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Key -> Optuna's distribution."""
        return {one.key: _distribution(one) for one in self.parameters}


class SweepStudy:
    """An open study.

    Args:
        file: ``STUDY_FILE`` of the sweep, made with ``create``.
        plan: As it was started with.

    Raises:
        SlimError: If it is damaged.
    """

    def __init__(self, file: Path, plan: StudyPlan) -> None:
        self.file, self.plan = file, plan
        self._keys = {one.key for one in plan.parameters}
        self.at_a_time = plan.options.workers  # trials, at most
        with _storage_errors(file):
            if not file.is_file():
                raise SlimError(f"{file} is missing", _ANEW)
            self._study = optuna.load_study(study_name=_NAME, storage=_storage(file))

    @staticmethod
    def create(file: Path, options: SweepOptions) -> None:
        """Write a study without trials; it appears whole."""
        with _storage_errors(file), atomic_file(file) as temporary:
            optuna.create_study(
                study_name=_NAME,
                storage=_storage(temporary, durable=False),
                directions=_directions(options),
            )

    # ------------------------------------------------------------------------------ the record

    def _attempts(self) -> dict[int, list[FrozenTrial]]:
        """Return number -> its attempts, in order."""
        attempts: dict[int, list[FrozenTrial]] = {}
        with _storage_errors(self.file):
            for trial in self._study.get_trials(deepcopy=False):
                number = trial.user_attrs["trial"]
                if type(number) is not int or number < 0 or set(trial.params) != self._keys:
                    raise SlimError(
                        f"{self.file} is damaged: its trial {trial.number} is none of this sweep",
                        _ANEW,
                    )
                attempts.setdefault(number, []).append(trial)
        return dict(sorted(attempts.items()))

    def fail_running(self) -> list[int]:
        """Mark as failed what a kill left running; return its numbers, which are queued again."""
        numbers = []
        for number, attempts in self._attempts().items():
            if attempts[-1].state == TrialState.RUNNING:
                self.fail(number, "killed")
                numbers.append(number)
        return numbers

    def fail(self, number: int, why: str) -> None:
        """Mark the running attempt of a trial as failed: it is proposed again."""
        last = self._attempts()[number][-1]
        with _storage_errors(self.file):
            optuna.trial.Trial(self._study, last._trial_id).set_user_attr("why", why)
            self._study.tell(last.number, state=TrialState.FAIL)

    def begin(self, proposal: Proposal) -> None:
        """Record that a trial runs, in one transaction."""
        params = {one.key: _encoded(one, proposal.values[one.key]) for one in self.plan.parameters}
        attributes = {
            "trial": proposal.number,
            "attempt": proposal.attempt,
            "workers": self.at_a_time,
        }
        running = create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions=self.plan.distributions,
            user_attrs=attributes,
        )
        with _storage_errors(self.file):
            self._study.add_trial(running)

    def finish(self, number: int, outcome: TrialOutcome) -> None:
        """Record how a trial ended; that it ended is written last."""
        last = self._attempts()[number][-1]
        values = objective_values(outcome, self.plan.options)
        with _storage_errors(self.file):
            trial = optuna.trial.Trial(self._study, last._trial_id)
            trial.set_user_attr("outcome", to_json(outcome))
            if len(self.plan.options.objective) == 1 and outcome.state in ("complete", "pruned"):
                for step, loss in outcome.curve:
                    trial.report(loss, step)
            if outcome.state == "complete":
                self._study.tell(last.number, values)
            else:
                self._study.tell(last.number, state=TrialState.PRUNED)

    def rows(self) -> list[TrialRow]:
        """Return the trials that have ended, by number."""
        rows = []
        for number, attempts in self._attempts().items():
            last = attempts[-1]
            if last.state in (TrialState.COMPLETE, TrialState.PRUNED):
                what = f"{self.file.name}: trial {number}"
                outcome = from_json(last.user_attrs.get("outcome"), TrialOutcome, what, _ANEW)
                rows.append(TrialRow(number, self._values(last), outcome, len(attempts)))
        return rows

    def workers(self) -> int:
        """Return the most workers that any trial was started with."""
        everything = [one for attempts in self._attempts().values() for one in attempts]
        return max((int(one.user_attrs.get("workers", 1)) for one in everything), default=1)

    def _values(self, trial: FrozenTrial) -> JsonObject:
        return {one.key: _decoded(one, trial.params[one.key]) for one in self.plan.parameters}

    # ------------------------------------------------------------------------------ proposals

    def next(self, trials: int) -> Proposal | None:
        """Return the first of ``trials`` that neither runs nor has ended; None if there is none."""
        attempts = self._attempts()
        for number in range(trials):
            before = attempts.get(number)
            if before is None:
                return Proposal(number, self._proposed(number))
            if before[-1].state == TrialState.FAIL:
                return Proposal(number, self._values(before[-1]), len(before))
        return None

    def _proposed(self, number: int) -> Point:
        if number < len(self.plan.queue):
            return self.plan.queue[number]
        study = _repeated(self.past(number), self.plan)
        entropy = [self.plan.options.seed, number]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(seed=seed)
        params = study.ask(self.plan.distributions).params
        return {one.key: _decoded(one, params[one.key]) for one in self.plan.parameters}

    def past(self, number: int, options: SweepOptions | None = None) -> list[PastTrial]:
        """Return the trials before ``number``, their values those of the objectives."""
        options = options or self.plan.options
        past = {
            other: PastTrial("running", params=attempts[-1].params)
            for other, attempts in self._attempts().items()
        }
        for row in self.rows():
            outcome = row.outcome
            past[row.number] = PastTrial(
                outcome.state,
                objective_values(outcome, options),
                outcome.curve if outcome.state in ("complete", "pruned") else [],
                past[row.number].params,
            )
        return [past[other] for other in range(number)]

    def importances(self) -> dict[str, float]:
        """Return key -> fraction of what explains the loss; empty for few complete trials."""
        rows = [row for row in self.rows() if row.outcome.state == "complete"]
        varied = len({row.outcome.loss for row in rows}) > 1
        if len(rows) < _LEAST_FOR_IMPORTANCES or not varied:
            return {}
        plan = replace(self.plan, options=replace(self.plan.options, objective=(LOSS,)))
        past = self.past(1 + max(row.number for row in rows), plan.options)
        fractions = optuna.importance.get_param_importances(_repeated(past, plan))
        return {key: float(value) for key, value in fractions.items()}


def objective_values(outcome: TrialOutcome, options: SweepOptions) -> list[float]:
    """Return what is minimised of a complete trial; nothing for another one."""
    if outcome.state != "complete":
        return []
    values = {LOSS: outcome.loss, "peak_memory": outcome.predicted_peak_bytes}
    chosen = [values[name] for name in options.objective]
    return [float(value) for value in chosen if value is not None]


def should_prune(request: TrialRequest, curve: Curve) -> bool:
    """Return whether a trial with these validations is to end now."""
    if request.pruner == "none":
        return False
    options = SweepOptions(pruner=request.pruner)
    study = _repeated(request.past, StudyPlan((), options, least_steps=request.least_steps))
    trial = study.ask()
    ends = False
    for step, loss in curve:
        trial.report(loss, step)
        ends = trial.should_prune()
    return ends


def _repeated(past: Sequence[PastTrial], plan: StudyPlan) -> optuna.Study:
    """Return a study in memory in which the trials went as they did, under their numbers."""
    one_objective = len(plan.options.objective) == 1
    study = optuna.create_study(
        study_name=_NAME,
        directions=_directions(plan.options),
        sampler=optuna.samplers.RandomSampler(seed=0),  # every parameter is given
        pruner=_pruner(plan),
    )
    distributions = plan.distributions
    for one in past:
        if distributions:
            study.enqueue_trial(one.params)
        trial = study.ask(distributions)
        for step, loss in one.curve if one_objective else ():
            trial.report(loss, step)
            trial.should_prune()  # Hyperband notes at which rung it is
        if one.state == "complete":
            study.tell(trial, one.values)
        elif one.state != "running":
            study.tell(trial, state=TrialState.PRUNED)
    return study


def _directions(options: SweepOptions) -> list[optuna.study.StudyDirection]:
    return [optuna.study.StudyDirection.MINIMIZE] * len(options.objective)


def _pruner(plan: StudyPlan) -> optuna.pruners.BasePruner:
    if not plan.options.prunes:
        return optuna.pruners.NopPruner()
    if plan.options.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=plan.least_steps)
    return optuna.pruners.MedianPruner()


def _distribution(one: Parameter) -> BaseDistribution:
    if one.choices is not None:
        return CategoricalDistribution([_encoded(one, choice) for choice in one.choices])
    if one.whole:
        step = 1 if one.step is None else int(one.step)
        return IntDistribution(int(one.low), int(one.high), log=one.log, step=step)
    return FloatDistribution(one.low, one.high, log=one.log, step=one.step)


def _encoded(one: Parameter, value: Any) -> Any:
    """Return a JSON value as Optuna's: lists and mappings as JSON text."""
    if one.choices is None:
        return int(value) if one.whole else float(value)
    return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value


def _decoded(one: Parameter, value: Any) -> Any:
    """Return what ``_encoded`` gave ``value`` for."""
    for choice in one.choices or ():
        if _encoded(one, choice) == value:
            return choice
    return value


def _storage(file: Path, *, durable: bool = True) -> optuna.storages.RDBStorage:
    """Return the storage in a file, whatever its name has in it that an URL would not.

    Args:
        file: Of the study.
        durable: Wait for the storage medium after each transaction.
    """

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(file)
        if not durable:
            connection.execute("PRAGMA synchronous = OFF")
        return connection

    engine = {"creator": connect, "poolclass": NullPool}
    return optuna.storages.RDBStorage("sqlite://", engine_kwargs=engine)


@contextmanager
def _storage_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, SQLAlchemyError, optuna.exceptions.OptunaError, KeyError) as error:
        text = one_line(error)
        if "disk is full" in text:
            raise ResourceError(
                f"the disk is full while writing {file}", "free some space"
            ) from error
        if "database is locked" in text:
            raise SlimError(
                f"{file} is in use by another program",
                "close it (optuna-dashboard?), and resume with --resume",
            ) from error
        raise SlimError(f"{file} is damaged: {text}", _ANEW) from error
