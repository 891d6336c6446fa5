"""A run that is given more steps: which of its checkpoints the longer run resumes from.

Invariant: a checkpoint belongs to a run if every step before it was taken at the rate that the run
has there; nothing else depends on how many steps are to come, but for measurements after the last
one, which ``TrainState.open`` undoes. So with ``constant`` the longer run resumes from the last
step, with ``wsd`` from the last checkpoint before the decay, and repeats, bit for bit, one that
began so long; with ``linear`` and ``cosine`` the rates continue (``optim.schedule``). It is
decided from the files alone, so a kill changes nothing. Try it: ``mlx-slim train smollm2-lora -o
runs/try --resume train.steps=200``, after one of 100.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mlx_slim import events
from mlx_slim.config.train import TrainConfig
from mlx_slim.training import rotation
from mlx_slim.training.callbacks import Monitor
from mlx_slim.training.optim import Extended, Schedule, schedule, warmup_steps
from mlx_slim.training.state import TrainState, read_state


def same_as_begun_longer(config: TrainConfig) -> bool:
    """Return whether the schedule of a longer run begins with that of a shorter one."""
    return config.schedule in ("constant", "wsd")


def steps_before_decay(config: TrainConfig, total: int, rate: Schedule) -> int:
    """Return how many steps of ``wsd`` come before its decay; 0 of other schedules."""
    if config.schedule != "wsd":
        return 0
    return max((step + 1 for step in range(total) if rate(step) == config.learning_rate), default=0)


def newest(
    folder: Path, config: TrainConfig, total: int, extended: Extended | None, length: int | None
) -> Path | None:
    """Return the newest checkpoint under ``folder`` that belongs to a run of ``total`` steps.

    With rounds of ``length`` steps, one from the midst of a round that the end of the shorter run
    cut off does not: the rest of its answers takes the weights of its beginning.
    """
    paths = (rotation.path_of(folder, step) for step in reversed(rotation.steps(folder)))
    if extended is None:
        return next(paths, None)
    rate = schedule(config, total, extended)

    def belongs(state: TrainState) -> bool:
        its_total = state.total or extended.totals[0]
        its_rate = schedule(config, its_total, extended.until(its_total))
        if length is not None and state.step % length:
            end = state.step - state.step % length + length
            if min(end, its_total) != min(end, total):
                return False
        return its_total == total or all(its_rate(n) == rate(n) for n in range(state.step))

    return next((path for path in paths if belongs(read_state(path))), None)


def reopen(
    state: TrainState, monitors: Iterable[Monitor], config: TrainConfig, total: int
) -> set[str]:
    """Undo in ``state`` and ``monitors`` what only the last step of a shorter run measured.

    Where the longer run is not as if begun so long, the measurements are kept.

    Returns:
        Names of the events of that step that a longer run does not report.
    """
    if state.step >= total:
        return set()
    undo = same_as_begun_longer(config)
    validated = {events.ValidationDone.name, events.TaskValidated.name}
    undone = validated if state.reopen(undo) else set()
    return undone.union(*(monitor.reopen(undo) for monitor in monitors))


def describe(config: TrainConfig, extended: Extended, total: int, start: int, reached: int) -> str:
    """Return the notice about the longer run.

    Args:
        config: Of the run.
        extended: How it began.
        total: Its steps.
        start: Steps done where it resumes.
        reached: Steps that had been done.
    """
    last, usual = extended.totals[-1], warmup_steps(config, total)
    text = f"{last:,} steps become {total:,}, resuming after step {start:,}"
    if not same_as_begun_longer(config):
        rate = schedule(config, last, extended.until(last))(last - 1)
        return (
            f"{text}: after step {last:,} the rate falls again, from {rate:.3g} "
            f"({config.schedule}); a run that begins with {total:,} steps has other rates and "
            "other losses"
        )
    if usual != extended.warmup:
        return (
            f"{text}; the warm-up stays {extended.warmup:,} steps, where a run that begins with "
            f"{total:,} has {usual:,} and so other losses: a whole number as train.warmup is the "
            "same in both"
        )
    again = ", before its decay; the steps from there on are taken again"
    return f"{text}{again * (start < reached)}, as a run that begins with {total:,} steps"
