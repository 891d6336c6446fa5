"""The loop of a sweep: propose, run, record, until so many trials have ended.

Invariant: a trial is proposed when its turn comes, with all that has ended by then; with one worker
that is every trial before it. Used by ``sweeping/run.py``, and by ``compare`` for its learning
rates.
"""

from __future__ import annotations

from collections.abc import Callable

from mlx_slim.errors import SlimError
from mlx_slim.sweeping.launch import Launcher
from mlx_slim.sweeping.records import TrialOutcome
from mlx_slim.sweeping.study import Proposal, SweepStudy


class InfeasibleError(SlimError):
    """The values of a trial exclude each other."""


class UnusableInputError(SlimError):
    """What the first trial met would stop the others too."""


def search(
    study: SweepStudy,
    trials: int,
    launcher: Launcher,
    prepare: Callable[[Proposal], tuple[str, int]],
    ended: Callable[[int, TrialOutcome], None],
) -> None:
    """Run what is missing of ``trials``.

    Args:
        study: Where they are recorded.
        trials: How many have ended when this returns.
        launcher: Runs them.
        prepare: Writes what a trial needs; returns the name of its folder, and the bytes that it is
            predicted to need. Raises ``InfeasibleError``.
        ended: Called after a trial was recorded, with its number.

    Raises:
        UnusableInputError: As the state ``failed`` says.
        Interrupted: The states are saved.
    """
    study.fail_running()
    numbers: dict[str, int] = {}
    proposal = prepared = None
    while True:
        while launcher.free:
            proposal = proposal or study.next(trials)
            if proposal is None:
                break
            try:
                prepared = prepared or prepare(proposal)
            except InfeasibleError as error:
                study.begin(proposal)
                outcome = TrialOutcome("infeasible", why=error.message)
                study.finish(proposal.number, outcome)
                ended(proposal.number, outcome)
                proposal = None
                continue
            name, peak = prepared
            study.begin(proposal)
            launcher.start(name, peak)
            numbers[name] = proposal.number
            proposal = prepared = None
        if not launcher.running:
            return
        name, outcome = launcher.wait()
        number = numbers.pop(name)
        if outcome.state == "killed":
            study.fail(number, outcome.why)
            continue
        if outcome.state == "failed":
            raise UnusableInputError(outcome.why, outcome.hint)
        study.finish(number, outcome)
        ended(number, outcome)
