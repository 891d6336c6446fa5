"""The one training loop: full, LoRA, QLoRA, DoRA and distillation differ in model and objective.

Invariant: the trajectory is a function of (weights, rows, configuration). Killing the process at
any moment and resuming repeats it bit for bit; the loop's whole memory is ``TrainState`` plus what
``checkpoint`` stores. It reports through events only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_slim import events
from mlx_slim.config.train import TrainConfig
from mlx_slim.data.batches import Batch, Batcher
from mlx_slim.data.plans import Plan
from mlx_slim.errors import DivergedError
from mlx_slim.progress import stage
from mlx_slim.runtime import to_float, world
from mlx_slim.sharding.model import ShardedModel
from mlx_slim.training import checkpoint, rotation
from mlx_slim.training.callbacks import (
    Action,
    Callback,
    ForwardHook,
    Monitor,
    UpdateHook,
    ValidationMetric,
    Verdict,
    combine,
    computing,
)
from mlx_slim.training.duty import pause
from mlx_slim.training.extension import newest, reopen, steps_before_decay
from mlx_slim.training.objective import Objective
from mlx_slim.training.optim import Extended, Optimizer, gradient_norm, schedule
from mlx_slim.training.rank_speed import RankSpeeds
from mlx_slim.training.ranks import number_of_ranks
from mlx_slim.training.rounds import Begun, Rounds
from mlx_slim.training.state import TrainState, read_state
from mlx_slim.training.step import Stepper
from mlx_slim.training.step_plan import next_plans, planned_steps, total_steps
from mlx_slim.training.step_result import StepResult
from mlx_slim.training.stop import StopRequest
from mlx_slim.training.validation import LossScorer, validation_loss


@dataclass
class Loop:
    """A training run over one model.

    Attributes:
        model: Its trainable parameters are tuned.
        objective: Summed loss of a batch.
        config: The ``train`` section.
        batcher: Training rows.
        validation: Validation rows, or None.
        validation_objective: What is measured on them; None takes ``objective``.
        observer: Receives every event.
        checkpoints: Folder of checkpoints.
        rate_scale: path -> multiple of the learning rate.
        budget_bytes: Memory budget, reported with the start.
        compiled: Fuse the step with ``mx.compile``.
        num_threads: Threads that compute chunks of a micro-batch on a CPU.
        prefix_sharing, sharded: As ``Stepper``.
        callbacks: What else takes part (``training/callbacks.py``).
        extended: How the run began, if it was given more steps later (``extend``).
        rounds: Rows that the model writes (``training/rounds.py``), or None.
    """

    model: nn.Module
    objective: Objective
    config: TrainConfig
    batcher: Batcher
    validation: Batcher | None
    observer: events.Observer
    checkpoints: Path
    rate_scale: Callable[[str], float] = lambda path: 1.0
    budget_bytes: int = 0
    compiled: bool = False
    num_threads: int = 1
    prefix_sharing: bool = False
    validation_objective: Objective | None = None
    callbacks: Sequence[Callback] = ()
    extended: Extended | None = None
    rounds: Rounds | None = None
    sharded: ShardedModel | None = None
    state: TrainState = field(default_factory=TrainState)

    def __post_init__(self) -> None:
        """Build the optimizer and the schedule."""
        self.speeds = RankSpeeds(self.observer)
        self.optimizer = Optimizer(self.model, self.config, self.rate_scale)
        self._monitors = [one for one in self.callbacks if isinstance(one, Monitor)]
        self._metric = next((m for m in self.callbacks if isinstance(m, ValidationMetric)), None)
        self._update_hooks = [one for one in self.callbacks if isinstance(one, UpdateHook)]
        hooks = [one for one in self.callbacks if isinstance(one, ForwardHook)]
        captured = [module for one in hooks for module in one.captured()]
        self.stepper = Stepper(
            self.model,
            self.objective,
            compiled=self.compiled,
            num_threads=self.num_threads,
            captured=captured,
            prefix_sharing=self.prefix_sharing,
            sharded=self.sharded,
        )
        measured = self.validation_objective or self.objective
        settings = {"captured": captured, "sharded": self.sharded, "num_threads": self.num_threads}
        self.scorer = LossScorer(self.model, measured, compiled=self.compiled, **settings)
        self.total, self.epochs = total_steps(self.config, self.batcher)
        self.extend(self.extended)
        for hook in self._update_hooks:
            hook.planned(self.total)

    def extend(self, extended: Extended | None) -> None:
        """Take the rates of a run that began as ``extended`` says."""
        self.extended = extended
        self.rate = schedule(self.config, self.total, extended)
        self._stable = steps_before_decay(self.config, self.total, self.rate)

    def newest(self) -> Path | None:
        """Return the newest checkpoint that this run can resume from."""
        length = None if self.rounds is None else self.rounds.steps
        return newest(self.checkpoints, self.config, self.total, self.extended, length)

    def preflight(self) -> int:
        """Run forward and backward pass of the largest micro-batch; return the peak in bytes."""
        self.model.train()
        mx.eval(self.optimizer.arrays())
        mx.reset_peak_memory()
        with computing(self.callbacks), stage("compiling and trying the largest batch"):
            self.stepper.micro(self.batcher.largest_batch())
            if self.rounds is not None:
                self.stepper.micro(self.rounds.largest_batch())
        return mx.get_peak_memory()

    def peek(self, path: Path) -> tuple[TrainState, set[str]]:
        """Return the train state to resume with from ``path``, and the events that it drops.

        The callbacks get their state of the checkpoint; nothing else changes.
        """
        state = checkpoint.load_callbacks(path, self.callbacks)
        return state, reopen(state, self._monitors, self.config, self.total)

    def resume(self, path: Path, *, report: bool = True) -> None:
        """Continue from the checkpoint at ``path``; ``report`` it."""
        self.state = checkpoint.load(path, self.model, self.optimizer, self.callbacks, self.sharded)
        reopen(self.state, self._monitors, self.config, self.total)
        if world().rank() == 0:
            rotation.remove_after(self.checkpoints, self.state.step)
            self._rotate()  # the kill may have come between the checkpoint and this
        if report:
            name = f"{path.parent.name}/{path.name}"
            self.observer.notify(events.Resumed(self.state.step, name, number_of_ranks()))

    def run(self, *, again: bool = False) -> events.Done | None:
        """Train to the end and return how it ended; ``again`` reports no start a second time.

        None: a round needs the memory of model and optimizer (``training/rounds.py``). Free them,
        build the loop anew, resume it from its newest checkpoint and run it ``again``.

        Raises:
            DivergedError: If loss or gradient is not finite; nothing was updated with it.
        """
        at = self.state
        if not again:
            plan = self.total, self.epochs, self.budget_bytes, at.step
            self.observer.notify(events.Started(*plan, ranks=number_of_ranks()))
        reason = "complete"
        verdict = combine(monitor.begin(at.step) for monitor in self._monitors)
        # Either: a resume from the checkpoint that the run was stopped with.
        if verdict.action is Action.STOP:
            reason = verdict.reason
        elif self._exhausted() and at.step < self.total:
            reason = "early_stopping"
        with StopRequest() as stop:
            begun = self._begin_round(stop, saved=at.step > 0) if reason == "complete" else None
            for epoch, fraction, plan in self._steps() if begun is Begun.READY else ():
                began = time.perf_counter()
                self._step(epoch, fraction, plan)
                last = at.step == self.total
                if last and at.step % self.config.validate_every:
                    at.keep_open()
                improved = self._due(self.config.validate_every, last) and self._validate()
                stopping = stop.seen_by_any_rank()
                exhausted = self._exhausted()
                verdict = combine(monitor.after(at.step, last) for monitor in self._monitors)
                due = self._due(self.config.save_every, last) or at.step == self._stable
                due = due or verdict.action >= Action.SAVE
                saving = improved or stopping or exhausted or due
                if saving:
                    self._save()
                if (stopping or exhausted) and not last:
                    reason = "interrupted" if stopping else "early_stopping"
                if verdict.action is Action.STOP:
                    reason = verdict.reason
                if stopping or exhausted or last or verdict.action is Action.STOP:
                    break
                begun = self._begin_round(stop, saved=saving)
                if begun is not Begun.READY:
                    break
                pause(time.perf_counter() - began, self.config.duty, lambda: stop.requested)
        if begun is Begun.PUT_AWAY:
            return None
        if begun is Begun.INTERRUPTED:
            reason = "interrupted"
        done = events.Done(
            step=at.step,
            reason=reason,
            tokens=at.tokens,
            seconds=at.seconds,
            peak_memory_bytes=mx.get_peak_memory(),
            best_validation=at.best_loss,
            best_step=at.best_step,
            result_step=self._result_step(verdict),
            duty=self.config.duty if self.config.duty < 1 else None,
            best_task=at.best_score,
        )
        self.observer.notify(done)
        return done

    def _result_step(self, verdict: Verdict) -> int:
        """Return the step whose weights are the result of a run that ends with ``verdict``."""
        step = self.state.step if self.state.best_step is None else self.state.best_step
        return step if verdict.latest_step is None else min(step, verdict.latest_step)

    def _exhausted(self) -> bool:
        """Whether validation has not improved for as long as ``early_stopping`` allows."""
        return self.state.since_best >= (self.config.early_stopping or math.inf)

    def _due(self, every: int, last: bool) -> bool:
        return last or self.state.step % every == 0

    def _begin_round(self, stop: StopRequest, *, saved: bool) -> Begun:
        """Have ready what the next step learns from; save the state if it is not."""
        at, rounds = self.state, self.rounds
        if rounds is None or at.step == self.total:
            return Begun.READY
        with computing(self.callbacks):
            if at.step % rounds.steps:
                begun = rounds.reopen(at.step, lambda: stop.requested)
            else:
                count = min(rounds.steps, self.total - at.step)
                plans = next_plans(self.batcher, self.config, at, count)
                rates = [self.rate(step) for step in range(at.step)]
                begun = rounds.begin(at.step, plans, rates, lambda: stop.requested)
        if begun is not Begun.READY and not saved:
            self._save()
        return begun

    def _steps(self) -> Iterator[tuple[int, float, Plan]]:
        """Yield epoch, fraction of it done after the step, and the step's plan over all ranks."""
        steps = planned_steps(self.batcher, self.config, self.state)
        while self.state.step < self.total:
            yield next(steps)

    def _batches(self, plan: Plan) -> Iterator[Batch]:
        """Yield the step's micro-batches, each with what its dropout is drawn from."""
        for index, groups in enumerate(plan):
            entropy = (self.config.seed, self.state.step, index)
            answers = None if self.rounds is None else self.rounds.batches(*entropy[1:])
            if answers is None:
                yield replace(self.batcher.batch(groups), entropy=entropy)
            for number, batch in enumerate(answers or ()):
                yield replace(batch, entropy=(*entropy, number))

    def update(self, batches: Iterable[Batch]) -> tuple[StepResult, float, float]:
        """Take one optimizer step; return what was measured, the gradient norm and the rate."""
        at = self.state
        self.model.train()
        with computing(self.callbacks):
            result = self.stepper.step(batches)
        gradients = result.gradients
        for hook in self._update_hooks:
            gradients = hook.gradients(gradients)
        norm = to_float((self.sharded.norm if self.sharded else gradient_norm)(gradients))
        if not (math.isfinite(result.loss) and math.isfinite(norm)):
            newest = rotation.latest(self.checkpoints)
            raise DivergedError(
                f"step {at.step + 1}: loss {result.loss} with gradient norm {norm}; "
                "weights not updated",
                f"lower train.learning_rate; the last good state is "
                f"{f'{newest.parent.name}/{newest.name}' if newest else 'the base model'}",
            )
        if self.config.clip and norm > self.config.clip:
            factor = self.config.clip / (norm + 1e-6)
            gradients = {path: value * factor for path, value in gradients.items()}
        learning_rate = self.rate(at.step)
        self.optimizer.update(gradients, learning_rate)
        result.gradients.clear()  # from here on each lives until its parameter is updated
        del gradients
        self.optimizer.evaluate()
        for hook in self._update_hooks:
            hook.updated(at.step + 1)
        return result, norm, learning_rate

    def _step(self, epoch: int, fraction: float, plan: Plan) -> None:
        at = self.state
        age = None if self.rounds is None else self.rounds.age(at.step)
        began = time.perf_counter()
        result, norm, learning_rate = self.update(self._batches(plan))
        seconds = time.perf_counter() - began
        at.step += 1
        at.tokens += result.tokens
        at.seconds += seconds
        if at.step % self.config.log_every == 0 or at.step == self.total:
            self.observer.notify(
                events.StepDone(
                    step=at.step,
                    epoch=round(epoch + fraction, 4),
                    loss=result.loss,
                    tokens=result.tokens,
                    computed_tokens=result.computed,
                    supervised_tokens=result.supervised,
                    tokens_per_second=result.tokens / seconds,
                    learning_rate=learning_rate,
                    grad_norm=norm,
                    active_memory_bytes=mx.get_active_memory(),
                    peak_memory_bytes=mx.get_peak_memory(),
                    metrics=result.metrics or None,
                    text_age=age,
                )
            )
        self.speeds.step(at.step, result, seconds, report=at.step % self.config.log_every == 0)

    def _validate(self) -> bool:
        """Score the validation rows, then the task; return whether this is the best so far."""
        if self.validation is None and self._metric is None:
            return False
        at = self.state
        settled = all(hook.settled(at.step) for hook in self._update_hooks)
        best = False
        if self.validation is not None:
            began = time.perf_counter()
            with computing(self.callbacks):
                loss, metrics, supervised = validation_loss(self.scorer, self.validation)
            lower = math.isfinite(loss) and (at.best_loss is None or loss < at.best_loss)
            best = settled and lower
            at.best_loss = loss if best else at.best_loss
            seconds = time.perf_counter() - began
            self.observer.notify(
                events.ValidationDone(at.step, loss, supervised, seconds, best, metrics or None)
            )
        if self._metric is not None:
            best = self._measure(self._metric, settled)
        if best:
            at.best_step, at.since_best = at.step, 0
        else:
            at.since_best += settled
        return best

    def _measure(self, metric: ValidationMetric, settled: bool) -> bool:
        """Measure the task; return whether this is the best so far."""
        at, began = self.state, time.perf_counter()
        measured = metric.measure()
        higher = at.best_score is None or measured.value > at.best_score  # NaN is not
        best = settled and higher and math.isfinite(measured.value)
        at.best_score = measured.value if best else at.best_score
        seconds = time.perf_counter() - began
        self.observer.notify(
            events.TaskValidated(at.step, **asdict(measured), seconds=seconds, best=best)
        )
        return best

    def _save(self) -> None:
        """Write a checkpoint on rank 0, from the slices of all if the model is sharded."""
        self.state.total = self.total
        self.state.required = sorted(self._required())
        if world().rank() > 0 and self.sharded is None:
            return
        tuned = self.model, self.optimizer, self.callbacks, self.sharded
        path = checkpoint.save(self.checkpoints, self.state, *tuned)
        if world().rank() == 0:
            self._rotate()
            self.observer.notify(events.Saved(self.state.step, f"{path.parent.name}/{path.name}"))

    def _required(self) -> set[int]:
        """Return the steps of the checkpoints that may become the result."""
        return self.state.best_steps().union(*(one.required_steps() for one in self._monitors))

    def _rotate(self) -> None:
        required = {self.state.step, *self._required()}  # later ones may be of other runs
        stable = [step for step in rotation.steps(self.checkpoints) if step <= self._stable]
        if stable:
            path = rotation.path_of(self.checkpoints, stable[-1])
            required |= {stable[-1], *read_state(path).required}
        rotation.rotate(self.checkpoints, self.config.keep, required)
