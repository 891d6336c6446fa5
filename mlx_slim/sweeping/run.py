"""Search the hyperparameters of a recipe: the trials, the best one on other seeds, the report.

Invariant: what has ended is not repeated, and a killed trial resumes from its checkpoint, so a kill
loses at most the steps since then; a sweep of one worker that was killed and resumed has the
trials, losses and winner of the undisturbed one. Only validation rows choose; no test question is
read. Files: ``request.json``, ``study.db`` (Optuna's, SQLite), ``trials/NNN/``, ``seeds/``,
``winner.yaml``, ``sweep.json`` (last) and ``report.html``. Try it:
``mlx-slim sweep sweep-smollm2-lora --space space-smollm2-lora -o runs/sweep``.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mlx_slim.artifacts import write_json, write_text
from mlx_slim.config.load import Resolved
from mlx_slim.errors import SlimError
from mlx_slim.events import Notice, Observer
from mlx_slim.planner.shipped_models import model_config
from mlx_slim.planner.students import predict_run
from mlx_slim.runtime import memory_budget
from mlx_slim.sweeping import conclusion
from mlx_slim.sweeping.folder import (
    OUTCOME,
    RECIPE,
    REPORT_FILE,
    REQUEST,
    SEEDS,
    STATE_FILE,
    STUDY_FILE,
    TRIALS,
    WINNER,
)
from mlx_slim.sweeping.launch import Launcher, launcher
from mlx_slim.sweeping.options import SweepOptions, check
from mlx_slim.sweeping.records import (
    SweepReport,
    TrialOutcome,
    TrialRequest,
    read_report,
    to_json,
)
from mlx_slim.sweeping.report import write_page
from mlx_slim.sweeping.request import (
    check_recipe,
    check_same,
    check_unscored,
    folder_of,
    plan_of,
    request_of,
    sweep_command,
)
from mlx_slim.sweeping.search import InfeasibleError, UnusableInputError, search
from mlx_slim.sweeping.space import SweepSpace, changed_recipe, load_space
from mlx_slim.sweeping.study import Proposal, SweepStudy
from mlx_slim.sweeping.trial import tidy


def sweep(
    base: Resolved,
    space: str,
    out: Path,
    options: SweepOptions,
    observer: Observer,
    *,
    resume: bool = False,
    processes: bool = False,
    quiet: bool = False,
) -> SweepReport:
    """Search in the folder ``out``; return its report.

    Args:
        base: The recipe.
        space: A shipped space's name, or the path of a ``.yaml`` file.
        out: The folder; must be new unless ``resume``.
        options: How many trials, judged by what.
        observer: Gets every event.
        resume: Resume a sweep that was started with the same values, or try more.
        processes: Run each trial in a process; several workers need it.
        quiet: Let these processes print warnings only.

    Raises:
        SlimError: Bad input, or no trial is complete.
        ResourceError: Out of disk.
        Interrupted: Ctrl-C; what has ended is kept, and the states of running trials.
    """
    check(options)
    chosen = load_space(space, base)
    for notice in base.notices:
        observer.notify(Notice(notice, "warning"))
    run_dir = folder_of(out)
    if not run_dir.check(resume=resume):
        check_recipe(base.recipe)
        for one in chosen.parameters:
            for choice in one.choices or ():
                check_unscored(changed_recipe(base, {one.key: choice}, chosen.origin).recipe)
    request = request_of(chosen, options)
    with run_dir.claim(resume=resume, match=partial(check_same, out, request)) as claimed:
        if claimed.note:
            observer.notify(Notice(claimed.note))
        if not claimed.started:
            SweepStudy.create(out / STUDY_FILE, options)
            write_json(out / STATE_FILE, to_json(request))
        with run_dir.resumable(partial(sweep_command, base, space, options)):
            running = _Sweep(chosen, out, options, observer)
            if running.complete():
                observer.notify(Notice(f"{out} is complete: nothing to do"))
                return read_report(out)
            descriptor = claimed.descriptor if processes else None
            try:
                running.run(descriptor, quiet)
            except UnusableInputError:
                if not claimed.started and not running.study.rows():
                    (out / STATE_FILE).unlink()  # the folder goes: nothing was tried
                raise
            return running.conclude()


@dataclass
class _Sweep:
    """A sweep in a folder that this process holds."""

    space: SweepSpace
    out: Path
    options: SweepOptions
    observer: Observer

    def __post_init__(self) -> None:
        """Open the study."""
        self.study = SweepStudy(self.out / STUDY_FILE, plan_of(self.space, self.options))

    def say(self, text: str, level: str = "info") -> None:
        """Tell the observer."""
        self.observer.notify(Notice(text, level))

    def complete(self) -> bool:
        """Return whether all is done; the report of a shorter sweep is removed.

        Raises:
            SlimError: If it has more trials already.
        """
        ended = len(self.study.rows())
        if ended > self.options.trials:
            raise SlimError(
                f"{self.out} has {ended} trials, --trials {self.options.trials} are fewer",
                "resume with as many or more",
            )
        file = self.out / REPORT_FILE
        if not file.exists():
            return False
        if ended == self.options.trials and len(read_report(self.out).seeds) >= self.options.seeds:
            return True
        file.unlink()
        return False

    def run(self, descriptor: int | None, quiet: bool) -> None:
        """Run what is missing."""
        options, train = self.options, self.space.base.recipe.train
        if len(options.objective) > 1 and options.pruner != "none":
            self.say(
                f"{' and '.join(options.objective)}: Optuna has no pruner for several objectives, "
                "every trial takes all its steps"
            )
        elif options.prunes and train.steps is not None and train.validate_every >= train.steps:
            self.say(
                f"trials are validated after their last step only (train.validate_every="
                f"{train.validate_every}, train.steps={train.steps}): none can be pruned",
                "warning",
            )
        budget = memory_budget(self.space.base.recipe.memory.budget)
        with launcher(self.out, descriptor, options, budget, quiet, self.observer) as launches:
            self.study.at_a_time = launches.most
            search(self.study, options.trials, launches, self._prepare, self._ended)
            self._run_seeds(launches)

    # ------------------------------------------------------------------------------ trials

    def _prepare(self, proposal: Proposal) -> tuple[str, int]:
        """Write the folder of a trial."""
        try:
            recipe = self.space.recipe(proposal.values)
        except SlimError as error:
            raise InfeasibleError("; ".join([error.message, *error.details])) from error
        name = f"{TRIALS}/{proposal.number:03d}"
        pruner = self.options.pruner if self.options.prunes else "none"
        every = self.space.base.recipe.train.validate_every
        past = self.study.past(proposal.number)
        request = TrialRequest(pruner, every, [replace(one, params={}) for one in past])
        again = " again, from its checkpoint" if proposal.attempt else ""
        self.say(
            f"── trial {proposal.number} (of {self.options.trials}){again}: "
            f"{conclusion.point_text(proposal.values)}"
        )
        return name, self._write(name, recipe, request, f"Trial {proposal.number} of a sweep.")

    def _write(self, name: str, recipe: Resolved, request: TrialRequest, what: str) -> int:
        """Write what a trial needs; return the bytes that it is predicted to need."""
        if recipe.recipe.distill is not None and recipe.recipe.distill.cache is None:
            recipe = self._cached(recipe)
        write_text(self.out / name / RECIPE, conclusion.trial_text(recipe, what))
        write_json(self.out / name / REQUEST, to_json(request))
        return self._peak(recipe) if self.options.several else 0

    def _cached(self, recipe: Resolved) -> Resolved:
        """Let trials share what teachers say; of several at a time each has its own."""
        if self.options.several:
            return recipe
        return changed_recipe(recipe, {"distill.cache": str(self.out / "targets")}, "sweep")

    def _peak(self, recipe: Resolved) -> int:
        """Return the predicted peak; the whole budget where there is no prediction."""
        try:
            config, _ = model_config(recipe.recipe)
            return predict_run(config, recipe.recipe, suggest=False).predicted_peak_bytes
        except SlimError:  # the trial says so
            return memory_budget(recipe.recipe.memory.budget)

    def _ended(self, number: int, outcome: TrialOutcome) -> None:
        """Tell how a trial ended, and remove all weights but the best one's."""
        text = f"trial {number}: "
        if outcome.loss is not None:
            text += f"validation loss {outcome.loss:.4f}"
        if outcome.why:
            text += f"{', ' if outcome.loss is not None else ''}{outcome.why}"
        self.say(text, "info" if outcome.state in ("complete", "pruned") else "warning")
        self._tidy()

    def _tidy(self) -> None:
        rows = self.study.rows()
        best = conclusion.best_of(rows)
        for row in rows:
            tidy(self.out / TRIALS / f"{row.number:03d}", keep=row == best)

    # ------------------------------------------------------------------------------ the end

    def _run_seeds(self, launches: Launcher) -> None:
        """Run the best trial again on other seeds."""
        best = conclusion.best_of(self.study.rows())
        if best is None:
            return
        recipe = self.space.recipe(best.values)
        seeds = [recipe.recipe.train.seed + 1 + number for number in range(self.options.seeds)]
        names = {conclusion.seed_folder(best.number, seed % 2**32): seed % 2**32 for seed in seeds}
        for folder in (self.out / SEEDS).glob("*"):  # of a trial that was the best once
            if f"{SEEDS}/{folder.name}" not in names:
                shutil.rmtree(folder, ignore_errors=True)
        waiting = [name for name in names if not (self.out / name / OUTCOME).exists()]
        while waiting or launches.running:
            while waiting and launches.free:
                name = waiting[0]
                one = conclusion.seed_recipe(recipe, names[name])
                what = f"Trial {best.number} of a sweep, on seed {names[name]}."
                peak = self._write(name, one, TrialRequest("none", 1, []), what)
                self.say(f"── trial {best.number} on seed {names[name]}")
                launches.start(waiting.pop(0), peak)
            name, outcome = launches.wait()
            if outcome.state == "killed":
                waiting.append(name)
                continue
            tidy(self.out / name, keep=False)

    def conclude(self) -> SweepReport:
        """Write the winner, the report and the page.

        Raises:
            SlimError: If no trial is complete.
        """
        self._tidy()
        shutil.rmtree(self.out / "targets", ignore_errors=True)
        report = conclusion.collect(self.out)
        if report.best is None:
            why = report.rows[0].outcome.why
            raise SlimError(
                f"none of {len(report.rows)} trials is complete; the first one: {why}",
                "change the recipe or the space, and start a new sweep",
            )
        write_text(self.out / WINNER, conclusion.winner_text(self.out, report))
        write_page(self.out, report)
        write_json(self.out / REPORT_FILE, to_json(report))
        return read_report(self.out)
