"""Stop a run when it forgets: bits per byte of a fixed general text must not rise too far.

Pre-loss control (arXiv 2403.15796): what a model can do follows its loss on general text, so that
loss is the thing to watch while it learns something special. Invariant: the text is measured before
the first step and every ``every`` steps; the newest weights within the limit are always in a
checkpoint, and they (or better ones before them) are the result of a run that was stopped. Start
and verdicts are in the checkpoint, so a resumed run decides as the uninterrupted one. How bits per
byte are measured, the workflow says. Try it:
``mlx-slim train smollm2-lora held_out.path=general.txt held_out.every=50 -o runs/watched``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

from mlx_slim import events
from mlx_slim.config.schema import HeldOutConfig
from mlx_slim.errors import SlimError
from mlx_slim.training.callbacks import SAVE, Companion
from mlx_slim.training.checkpoint import WATCHED, Position

REASON = "held_out"


class HeldOut(Companion):
    """Watches one text.

    Args:
        config: Limit, interval and patience.
        measure: Returns bits per byte of the text, by the weights as they are now.
        observer: Hears every measurement.
        identity: Hash of the text, hexadecimal: a resumed run must watch the same.
    """

    def __init__(
        self,
        config: HeldOutConfig,
        measure: Callable[[], float],
        observer: events.Observer,
        identity: str,
    ) -> None:
        self.config, self._measure, self._observer = config, measure, observer
        self._identity = list(bytes.fromhex(identity))

    def begin(self, position: Position) -> str:
        """Measure the start, once a run; refuse to go on where the run was stopped already."""
        if position.held_out_start is None:
            began = time.perf_counter()
            position.held_out_start = self._measure()
            self._tell(position, position.held_out_start, 0.0, True, began)
        return REASON if position.held_out_over >= self.config.patience else ""

    def after(self, position: Position, last: bool) -> str:
        """Measure when it is time.

        Raises:
            SlimError: If it is time to stop and no measured weights were within the limit.
        """
        if not (last or position.step % self.config.every == 0):
            return ""
        if position.step % self.config.every:
            position.keep_open(WATCHED)
        began = time.perf_counter()
        bits, start = self._measure(), position.held_out_start
        assert start is not None
        rise = bits / start - 1
        within = rise <= self.config.max_rise  # NaN is not
        self._tell(position, bits, rise, within, began)
        if within:
            position.held_out_step, position.held_out_over = position.step, 0
            return SAVE
        position.held_out_over += 1
        if last:
            position.held_out_over = max(position.held_out_over, self.config.patience)
        if position.held_out_over < self.config.patience:
            return ""
        if position.held_out_step is None:
            raise SlimError(
                f"the held-out text costs {rise:.1%} more bits after step {position.step} "
                f"(limit {self.config.max_rise:.1%}), and no step before was within the limit",
                f"lower train.learning_rate, or measure before: held_out.every below "
                f"{self.config.every}",
            )
        return REASON

    def _tell(
        self, position: Position, bits: float, rise: float, within: bool, began: float
    ) -> None:
        seconds = time.perf_counter() - began
        self._observer.notify(events.HeldOutDone(position.step, bits, rise, within, seconds))

    def state(self) -> dict[str, mx.array]:
        """Return the text's hash."""
        return {"text": mx.array(self._identity, mx.uint8)}

    def load_state(self, flat: dict[str, mx.array]) -> None:
        """Compare the hash.

        Raises:
            SlimError: If the text is another one now.
        """
        if flat["text"].tolist() != self._identity:
            raise SlimError(
                f"held_out.path={self.config.path} is another text than when the run started",
                "resume with the text that it started with, or start a new run",
            )
