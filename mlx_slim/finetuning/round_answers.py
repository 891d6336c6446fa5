"""The answers of one round: a folder of JSON lines, and the rows that are trained on.

Invariant: ``answers.jsonl`` grows by whole chunks whose composition does not depend on what is
there already, so what a kill leaves is completed to the same file; ``about.json`` says what the
answers depend on besides the weights, and a folder that says otherwise is begun anew;
``complete.json`` comes last, with hashes of both: edited ones are refused. Try it:
``mlx-slim distill distill-on-policy-smollm2 -o runs/on-policy``, then read
``runs/on-policy/rounds/round-0/answers.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mlx_slim.artifacts import (
    disk_errors,
    fsync,
    hash_file,
    json_lines,
    read_json,
    remove_folder,
    write_json,
)
from mlx_slim.errors import SlimError
from mlx_slim.reading import JsonObject, field, library_errors, parse_json, read_object, short

ANSWERS, ABOUT, COMPLETE, TIMES = "answers.jsonl", "about.json", "complete.json", "times.json"
REWARDS = "rewards.jsonl"  # of the answers to each question, a line each


@dataclass(frozen=True)
class SampledAnswer:
    """An answer of the model, as a line of the file.

    Attributes:
        row: Number of the training row whose prompt it answers.
        number: Of the answer among those of the row in this round.
        prompt: As text.
        text: The answer as text, without special tokens.
        stop_reason: ``eos``, ``until``, or ``length`` where it ran into its limit.
        ids: Token ids that were drawn, the stop token included.
        log_probs: Of ``ids`` when they were drawn, nats; None where nobody wants them.
    """

    row: int
    number: int
    prompt: str
    text: str
    stop_reason: str
    ids: list[int]
    log_probs: list[float] | None = None


class RoundFolder:
    """The folder of a round.

    Args:
        path: Created with the first answer.
        about: What the answers depend on besides the weights.
        chunk: Answers that are appended at a time.
    """

    def __init__(self, path: Path, about: JsonObject, chunk: int) -> None:
        self.path, self.chunk = path, chunk
        about = json.loads(json.dumps(about))
        files = (ANSWERS, COMPLETE, TIMES, REWARDS, ABOUT)
        changed = (path / ABOUT).is_file() and read_json(path / ABOUT) != about
        if changed and not remove_folder(path, files):
            raise SlimError(f"{short(path)} holds files that belong to no round", "move them away")
        if not (path / ABOUT).is_file():
            write_json(path / ABOUT, about)

    @classmethod
    def read(cls, path: Path, chunk: int) -> tuple[RoundFolder, JsonObject]:
        """Return the folder of a round that is complete, and its ``about.json``.

        Raises:
            SlimError: If it is not there.
        """
        if not (path / ABOUT).is_file() or not (path / COMPLETE).is_file():
            raise SlimError(
                f"{short(path)} is gone: a run in the midst of a round needs its answers, which "
                "older weights wrote",
                "put the folder back, or remove the checkpoints of that round and resume",
            )
        about = read_object(path / ABOUT, micro_batches=list)
        return cls(path, about, chunk), about

    @property
    def complete(self) -> bool:
        """Whether all answers are there."""
        return (self.path / COMPLETE).is_file()

    def answers(self) -> list[SampledAnswer]:
        """Return the answers of the whole chunks that are there; what is behind them goes.

        Raises:
            SlimError: A line that is no answer, or answers that are not as they were written.
        """
        file = self.path / ANSWERS
        if self.complete:
            record = read_object(self.path / COMPLETE, sha256=str)
            hashes = {file: record["sha256"], self.path / ABOUT: record.get("about")}
            for one, sha256 in hashes.items():  # rounds of earlier versions have none of ABOUT
                if sha256 is not None and not (one.is_file() and hash_file(one) == sha256):
                    raise SlimError(
                        f"{short(one)} is not as this run wrote it: the steps that learned from it "
                        "cannot be repeated",
                        "put the file back as it was, or start a new run",
                    )
            return [_parsed(file, *line) for line in json_lines(file)]
        if not file.is_file():
            return []
        lines = [line for line in json_lines(file) if line[1].endswith(b"\n")]
        lines = lines[: len(lines) // self.chunk * self.chunk]
        with disk_errors(file), file.open("r+b") as handle:
            handle.truncate(sum(len(raw) for _, raw in lines))
        return [_parsed(file, *line) for line in lines]

    def append(self, answers: Sequence[SampledAnswer]) -> None:
        """Append a chunk, flushed to the disk."""
        file = self.path / ANSWERS
        lines = [json.dumps(_record(one), ensure_ascii=False) + "\n" for one in answers]
        data = "".join(lines).encode("utf-8", "replace")
        with disk_errors(file), file.open("ab") as handle:
            handle.write(data)
            handle.flush()
            fsync(handle.fileno())

    def finish(self, answers: int) -> None:
        """Say that all answers are there."""
        file = self.path / ANSWERS
        file.touch()
        hashes = {"sha256": hash_file(file), "about": hash_file(self.path / ABOUT)}
        write_json(self.path / COMPLETE, {"answers": answers, **hashes})

    def seconds(self, work: str) -> float:
        """Return the time that ``writing`` or ``scoring`` took so far, kills included."""
        file = self.path / TIMES
        if not file.is_file():
            return 0.0
        return field(read_object(file), short(file), f"{work}_seconds", float, 0.0)

    def add_seconds(self, work: str, seconds: float) -> None:
        """Add to that time."""
        times = {name: self.seconds(name) for name in ("writing", "scoring")}
        times[work] = round(times[work] + seconds, 6)
        write_json(self.path / TIMES, {f"{name}_seconds": value for name, value in times.items()})


def _record(answer: SampledAnswer) -> JsonObject:
    return {key: value for key, value in asdict(answer).items() if value is not None}


def _parsed(file: Path, number: int, raw: bytes) -> SampledAnswer:
    where = f"{short(file)}, line {number}"
    with library_errors(f"{where} is no answer of a model", "start a new run"):
        record = parse_json(raw, where)
        field(record, where, "ids", list, of=int)
        return SampledAnswer(**record)


class Round:
    """Prompts with the model's answers, as rows to train on: a ``RowStore``.

    Attributes:
        number: From 0.
        step: Optimizer steps done when it begins.
        steps: Its optimizer steps.
        folder: Where it is stored.
        answers: The answers; row i of this store is prompt and answer i.
        lengths: Tokens of each row, int64 (R,).
        supervised: Tokens of each answer, int64 (R,).
    """

    def __init__(
        self,
        number: int,
        step: int,
        steps: int,
        folder: RoundFolder,
        answers: Sequence[SampledAnswer],
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self.number, self.step, self.steps, self.folder = number, step, steps, folder
        self.answers = list(answers)
        self._prompts = list(prompts)
        self.supervised = np.array([len(one.ids) for one in self.answers], np.int64)
        self.lengths = self.supervised + np.array([len(p) for p in self._prompts], np.int64)

    def __len__(self) -> int:
        return len(self.answers)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of row ``i``, int32 (T,), and the supervised mask, bool (T,)."""
        prompt = self._prompts[i]
        ids_T = np.array([*prompt, *self.answers[i].ids], np.int32)
        return ids_T, np.arange(len(ids_T)) >= len(prompt)

    def weights(self, i: int) -> np.ndarray | None:
        """Return None: all targets of row ``i`` weigh 1."""
        return None
