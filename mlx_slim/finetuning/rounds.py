"""Rounds of answers: the model answers prompts of the next steps' rows, and learns from that.

Invariant: a coin of its own random stream says which micro-batches of the plan learn from answers
in place of their rows; every answer draws from (seed, round, row, number); so the plan, the steps
and the rest of the run are those of a run without rounds. Answers are on disk before they are
learned from. What is learned from them, and what scores them first, is a ``RoundScorer``'s:
teachers (``distillation/on_policy.py``) or rewards. Try it:
``mlx-slim distill distill-on-policy-smollm2 -o runs/on-policy``.
"""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, final

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim import events
from mlx_slim.artifacts import hash_bytes, write_json
from mlx_slim.config.rounds import RoundsConfig
from mlx_slim.config.train import TrainConfig
from mlx_slim.data.collate import Batch, RowStore, collate, padded
from mlx_slim.data.plans import Plan
from mlx_slim.data.shapes import Shape
from mlx_slim.data.store import TokenStore
from mlx_slim.data.tokenize import unwrap
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.prompts import split, unchanged
from mlx_slim.finetuning.round_answers import Round, RoundFolder, SampledAnswer
from mlx_slim.planner.drawing import batch_of_answers
from mlx_slim.planner.memory import Prediction
from mlx_slim.progress import stage
from mlx_slim.reading import JsonObject, read_object
from mlx_slim.round_events import RoundBegun
from mlx_slim.runtime import from_first_rank
from mlx_slim.training.rounds import Begun

FOLDER = "rounds"  # inside a run folder
CHUNK = 64  # answers that are computed and stored at a time: what a kill may lose
COMPILED_SHAPES = 2  # of batches of answers, where the step is compiled
_COIN = 0x636F696E  # of the random stream of the coin
_VERSION = 1  # of the files: raise it when the same ``about.json`` would give other answers


class RoundScorer(Protocol):
    """What a strategy adds to the answers of a round before they are learned from.

    Attributes:
        fraction: Of the micro-batches, how many learn from answers.
        answers: To each prompt.
        log_probs: Whether answers are stored with the log-probabilities of their tokens.
        until: Texts that end an answer.
    """

    fraction: float
    answers: int
    log_probs: bool
    until: Sequence[str]

    def place(self, prediction: Prediction, budget: int, observer: events.Observer) -> Prediction:
        """Decide what else is in memory beside the run; return its cost with that."""
        ...

    def score(self, answers: Round, model: nn.Module, stop: Callable[[], bool]) -> Begun:
        """Have ready what the objective reads of batches with ``sampled``.

        Called again for a round that was scored before: after a kill, or when the model is back
        after ``PUT_AWAY``.

        Args:
            answers: The round; time is added to its folder.
            model: As it is trained, not to be changed.
            stop: Whether to end early.
        """
        ...

    def score_alone(self, observer: events.Observer) -> bool:
        """Do what ``score`` could not while the model was in memory; False if interrupted."""
        ...

    def close(self) -> None:
        """Free what is in memory besides the model: the run trains no more."""
        ...

    def figures(self, answers: Round) -> dict[str, float] | None:
        """Return what ``RoundBegun`` reports of a round that was scored, or None."""
        ...


class WithoutNotices:
    """Passes on every event but notices while it is ``active``: a run that is built again."""

    def __init__(self, observer: events.Observer) -> None:
        self.observer = observer
        self.active = True

    def notify(self, event: events.Event) -> None:
        """Pass ``event`` on, unless it is a notice that was given before."""
        if not (self.active and isinstance(event, events.Notice)):
            self.observer.notify(event)


@final
class AnswerRounds:
    """The rounds of a run (``training/rounds.py``).

    Args:
        model: Its weights at the beginning of a round write the answers.
        tokenizer: Of the model.
        rows: Training rows, whose prompts are answered.
        folder: Of the run.
        config: The ``rounds`` section.
        train: The ``train`` section.
        length: Longest row, tokens.
        scorer: Of the strategy.
        observer: Receives an event for each round.
        compiled: Whether the step is compiled: batches then have few shapes.
        budget: Memory that is planned for the run, bytes: no more is used while answers are drawn.

    Raises:
        SlimError: If a row has no prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        rows: TokenStore,
        folder: Path,
        config: RoundsConfig,
        train: TrainConfig,
        length: int,
        scorer: RoundScorer,
        observer: events.Observer,
        *,
        compiled: bool,
        budget: int,
    ) -> None:
        self.steps = config.steps
        self._model, self._tokenizer, self._rows = model, tokenizer, rows
        self._folder = folder / FOLDER
        self._config, self._train, self._length = config, train, length
        self._scorer, self._observer = scorer, observer
        self._compiled, self._budget = compiled, budget
        self._round: Round | None = None
        self._micro_batches: dict[tuple[int, int], range] = {}
        self._longest_prompt = max(len(self._prompt(row)) for row in range(len(rows)))

    def _prompt(self, row: int) -> list[int]:
        ids_T, supervised_T = self._rows.row(row)
        if int(np.argmax(supervised_T)) <= 1:
            raise SlimError(
                f"training row {row + 1} has no prompt to answer: it is learned from its start on",
                "give rows with prompts (data.mask_prompt=true); distill.method=logits takes texts",
            )
        return split(ids_T, supervised_T)[0]

    # ------------------------------------------------------------------------------- beginning

    def begin(
        self, step: int, plans: Sequence[Plan], rates: Sequence[float], stop: Callable[[], bool]
    ) -> Begun:
        """Have the answers of the round after ``step`` steps written and scored."""
        requests, micro_batches = self._requests(step, plans)
        about = {
            "version": _VERSION,
            "step": step,
            "steps": len(plans),
            "seed": self._train.seed,
            "rows": hash_bytes(self._rows.fingerprint.encode()),
            "rates": hash_bytes(struct.pack(f"<{len(rates)}d", *rates)),
            "settings": self._config.model_dump(mode="json"),
            "fraction": self._scorer.fraction,
            "answers": self._scorer.answers,
            "micro_batches": micro_batches,
        }
        self._round, self._micro_batches = None, {}
        if not from_first_rank(partial(self._write, step, about, requests, stop)):
            return Begun.INTERRUPTED
        return self._open(step, stop, report=True)

    def reopen(self, step: int, stop: Callable[[], bool]) -> Begun:
        """Have the round ready in whose midst ``step`` is."""
        if self._round is not None and self._round.number == step // self.steps:
            return Begun.READY
        return self._open(step - step % self.steps, stop, report=False)

    def _path(self, step: int) -> Path:
        return self._folder / f"round-{step // self.steps}"

    def _open(self, step: int, stop: Callable[[], bool], *, report: bool) -> Begun:
        folder, about = RoundFolder.read(self._path(step), CHUNK)
        stored = folder.answers()
        prompts = [self._prompt(one.row) for one in stored]
        answers = Round(step // self.steps, step, about["steps"], folder, stored, prompts)
        begun = self._scorer.score(answers, self._model, stop) if stored else Begun.READY
        if begun is not Begun.READY:
            return begun
        self._round = answers
        self._micro_batches = {
            (at, index): range(first, first + count)
            for at, index, first, count in about["micro_batches"]
        }
        if report:
            self._observer.notify(
                RoundBegun(
                    step=step,
                    round=answers.number,
                    steps=answers.steps,
                    answers=len(stored),
                    tokens=int(answers.supervised.sum()),
                    cut=sum(one.stop_reason == "length" for one in stored),
                    writing_seconds=round(folder.seconds("writing"), 3),
                    scoring_seconds=round(folder.seconds("scoring"), 3),
                    metrics=self._scorer.figures(answers) if stored else None,
                )
            )
        return Begun.READY

    def replaces(self, step: int, index: int) -> bool:
        """Return whether micro-batch ``index`` of the step after ``step`` steps is of answers."""
        coin = np.random.default_rng([self._train.seed, _COIN, step, index])
        return coin.random() < self._scorer.fraction

    def _requests(
        self, step: int, plans: Sequence[Plan]
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int, int, int]]]:
        """Return (row, number) of each answer, and step, micro-batch, first and count of them."""
        requests: list[tuple[int, int]] = []
        micro_batches: list[tuple[int, int, int, int]] = []
        numbers: Counter[int] = Counter()
        for at, plan in enumerate(plans, step):
            for index, groups in enumerate(plan):
                if not self.replaces(at, index):
                    continue
                first = len(requests)
                for row in (row for group in groups for row in group):
                    for _ in range(self._scorer.answers):
                        requests.append((row, numbers[row]))
                        numbers[row] += 1
                micro_batches.append((at, index, first, len(requests) - first))
        return requests, micro_batches

    # --------------------------------------------------------------------------------- writing

    def _write(
        self,
        step: int,
        about: JsonObject,
        requests: Sequence[tuple[int, int]],
        stop: Callable[[], bool],
    ) -> bool:
        """Have all answers on disk; return False if it was stopped before."""
        folder = RoundFolder(self._path(step), about, CHUNK)
        if folder.complete:
            return True
        done = len(folder.answers())
        with unchanged(self._model), stage("answering prompts", len(requests), "prompts") as work:
            size = self._batch_size()
            while done < len(requests):
                if stop():
                    return False
                began = time.perf_counter()
                folder.append(self._answers(step, requests[done : done + CHUNK], size))
                folder.add_seconds("writing", time.perf_counter() - began)
                done += CHUNK
                work.reach(min(done, len(requests)))
        folder.finish(len(requests))
        return True

    def _answers(
        self, step: int, requests: Sequence[tuple[int, int]], batch_size: int
    ) -> list[SampledAnswer]:
        from mlx_slim.evaluation.scoring.generate import generate_batch  # imports mlx-lm
        from mlx_slim.evaluation.scoring.sampling import Sampling

        prompts = [self._prompt(row) for row, _ in requests]
        generations = generate_batch(
            self._model,
            self._tokenizer,
            prompts,
            self._config.longest_answers(prompts, self._length),
            batch_size=batch_size,
            cache_bytes=max(1, self._budget - mx.get_active_memory()),
            stops=self._scorer.until,
            sampling=Sampling(self._config.temperature, self._config.top_p),
            keys=[(self._train.seed, step // self.steps, *request) for request in requests],
            log_probs=self._scorer.log_probs,
        )
        decode = unwrap(self._tokenizer).decode
        return [
            SampledAnswer(
                row=row,
                number=number,
                prompt=decode(prompt),
                text=generation.text,
                stop_reason=generation.stop_reason,
                ids=generation.drawn,
                log_probs=generation.log_probs,
            )
            for (row, number), prompt, generation in zip(
                requests, prompts, generations, strict=True
            )
        ]

    def _batch_size(self) -> int:
        """Return the answers of a batch, decided once: another number is rounded otherwise."""
        from mlx_slim.evaluation.scoring.answer_cache import footprint  # imports mlx-lm

        file = self._folder / "batch.json"
        if not file.is_file():
            room = self._budget - mx.get_active_memory()
            needs = footprint(self._model), room, self._longest_row()
            write_json(file, {"batch_size": batch_of_answers(*needs, CHUNK)})
        return int(read_object(file, batch_size=int)["batch_size"])

    # --------------------------------------------------------------------------------- batches

    def age(self, step: int) -> int:
        """Return how many steps old the text is that the next step learns from."""
        return step % self.steps

    def batches(self, step: int, index: int) -> list[Batch] | None:
        """Return the answers to the rows of a micro-batch, as batches within ``batch_tokens``."""
        numbers = self._micro_batches.get((step, index))
        if numbers is None:
            return None
        assert self._round is not None
        groups = self._cut(self._round.lengths - 1, numbers)
        return [self._collated(self._round, group, self._shape(group)) for group in groups]

    def _cut(self, lengths_R: np.ndarray, numbers: Sequence[int]) -> list[list[int]]:
        """Return the rows in groups of like length that fit a micro-batch each."""
        groups: list[list[int]] = []
        room = 0
        for number in sorted(numbers, key=lambda n: (-lengths_R[n], n)):
            if room == 0:
                width = max(1, int(lengths_R[number]))
                if self._compiled:
                    width = next(shape.width for shape in self._shapes if width <= shape.width)
                room = max(1, self._train.batch_tokens // width)
                groups.append([])
            groups[-1].append(number)
            room -= 1
        return groups

    def _collated(self, rows: RowStore, group: Sequence[int], shape: Shape | None) -> Batch:
        batch = collate(rows, [[number] for number in group], isolate=False)
        return replace(batch if shape is None else padded(batch, shape), sampled=True)

    def _shape(self, group: Sequence[int]) -> Shape | None:
        assert self._round is not None
        if not self._compiled:
            return None
        longest = max(int(self._round.lengths[number]) - 1 for number in group)
        return next(shape for shape in self._shapes if longest <= shape.width)

    def _longest_row(self) -> int:
        """Return the most tokens that prompt and answer can have."""
        return min(self._length, self._longest_prompt + self._config.max_tokens)

    @cached_property
    def _shapes(self) -> list[Shape]:
        """The shapes of batches in a compiled step, the narrow one first."""
        widest = max(2, self._longest_row() - 1)
        shapes = []
        for width in sorted({-(-widest // COMPILED_SHAPES), widest}):
            rows = max(1, self._train.batch_tokens // width)
            shapes.append(Shape(rows, width, rows * min(width, self._config.max_tokens)))
        return shapes

    def largest_batch(self) -> Batch:
        """Return a batch, for measuring only, of the longest rows that there can be."""
        rows, width, targets = self._shapes[-1]
        each = targets // rows
        positions_N = np.concatenate(
            [np.arange(width - each, width) + row * width for row in range(rows)]
        ).astype(np.int32)
        return Batch(
            tokens_BT=np.zeros((rows, width), np.int32),
            positions_N=positions_N,
            targets_N=np.zeros_like(positions_N),
            sources_N=np.full(len(positions_N), -1, np.int64),
            segments_BT=None,
            real_tokens=rows * width,
            rows=rows,
            lengths_BT=np.full((rows, width), width, np.int32),
            weights_N=np.ones(len(positions_N), np.float32) if self._compiled else None,
            sampled=True,
        )
