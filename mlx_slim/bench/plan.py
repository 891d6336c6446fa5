"""Predicted against measured peak memory, over a grid of small runs.

Invariant: each case is a real run (rows, loop, optimizer) in a process of its own, predicted from
shapes and row lengths alone, as ``train`` predicts it; the second model is random, of another
architecture. Cases that are in the output file already are not run again. Try it:
``mlx-slim bench plan MODEL -o plan.jsonl``.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import mlx.core as mx

from mlx_slim.artifacts import read_records, write_text
from mlx_slim.bench.options import METHODS
from mlx_slim.bench.rounds import run_side
from mlx_slim.bench.sides import Peaks
from mlx_slim.claims import held
from mlx_slim.errors import SlimError
from mlx_slim.models.build import build
from mlx_slim.models.load import load_tokenizer
from mlx_slim.models.save import save_model
from mlx_slim.reading import JsonObject, field
from mlx_slim.units import human_bytes

WITHIN = 0.15
# (row length, rows of a batch): of the user's model ("given"), and of the random one
SHAPES = {"given": ((128, 4), (512, 2)), "random": ((128, 8), (512, 4))}
_WORDS = ("the", "quick", "brown", "fox", "reads", "seven", "books", "about", "old", "ships")
# 52 M parameters with a vocabulary of 49,152: biases, layer norms, no gate, one norm a block.
_PHI = {
    "model_type": "phi",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "num_attention_heads": 6,
    "num_hidden_layers": 8,
    "num_key_value_heads": 6,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def random_model(folder: Path, tokenizer_of: str) -> Path:
    """Write a random Phi-shaped model with the tokenizer of another one; return its folder."""
    tokenizer = load_tokenizer(tokenizer_of)
    config = {**_PHI, "vocab_size": -(-len(tokenizer.get_vocab()) // 64) * 64}
    mx.random.seed(0)
    model = build(config)
    mx.eval(model.parameters())
    save_model(folder, model, tokenizer, config)
    return folder


def _rows(folder: Path, length: int, count: int) -> Path:
    """Write rows longer than ``length`` tokens; they are cut to it."""
    file = folder / f"rows-{length}.jsonl"
    words = [_WORDS[i % len(_WORDS)] for i in range(2 * length)]
    row = {"prompt": " ".join(words[: length // 12]), "completion": " ".join(words)}
    file.write_text((json.dumps(row) + "\n") * count, encoding="utf-8")
    return file


def cases(model: str, random: Path, rows: Path) -> Iterator[tuple[str, JsonObject]]:
    """Yield (name, recipe values) of every case."""
    for which, source in (("given", model), ("random", str(random))):
        for length, count in SHAPES[which]:
            for method in METHODS:
                for checkpoint in (False, True):
                    yield (
                        f"{which} {method} {count}x{length}{' checkpointed' if checkpoint else ''}",
                        {
                            "model": source,
                            "method": method,
                            "data": {
                                "path": str(_rows(rows, length, count)),
                                "truncation": "right",
                                "validation": 0,
                            },
                            "train": {
                                "steps": 2,
                                "max_length": length,
                                "batch_tokens": count * length,
                                "grad_checkpoint": checkpoint,
                            },
                        },
                    )


@dataclass(frozen=True, kw_only=True)
class Case(Peaks):
    """A finished case: a line of the output file; ``error`` is predicted / measured − 1."""

    case: str
    error: float

    @classmethod
    def of(cls, case: str, peaks: Peaks) -> Case:
        """Return the record of a case."""
        error = peaks.predicted_peak_bytes / peaks.measured_peak_bytes - 1
        return cls(case=case, error=round(error, 4), **vars(peaks))

    @classmethod
    def read(cls, values: JsonObject, where: str) -> Case:
        """Return the record of a line.

        Raises:
            SlimError: If it is no finished case.
        """
        kinds = {"case": str, "breakdown": dict, "error": float, "seconds_per_batch": float}
        keys = [one.name for one in fields(cls)]
        if not set(keys) <= values.keys():
            raise SlimError(f"{where} has other records than finished cases", "choose another file")
        return cls(**{key: field(values, where, key, kinds.get(key, int)) for key in keys})

    def as_json(self) -> JsonObject:
        """Return the object of a line."""
        first = {"case": self.case, "error": self.error}
        return {**first, **{k: v for k, v in asdict(self).items() if k not in first}}

    def line(self) -> str:
        """Return the case as a line of text."""
        predicted = human_bytes(self.predicted_peak_bytes)
        measured = human_bytes(self.measured_peak_bytes)
        return f"{self.case:36} {predicted:>9} {measured:>9} {self.error:+7.1%}"


def bench_plan(model: str, out: Path | None, progress: Callable[[str], None]) -> JsonObject:
    """Measure every case.

    Args:
        model: Hub id or folder of a dense model.
        out: File of finished cases (JSON lines), read first and written after each case.
        progress: Called with a line after each case.

    Returns:
        ``cases`` (each with ``predicted_peak_bytes``, ``measured_peak_bytes``, ``error``), ``n``,
        ``within`` (fraction of the cases with an error of at most 15%), ``median_error``,
        ``worst_error``.
    """
    done: dict[str, Case] = {}
    with contextlib.ExitStack() as stack:
        if out is not None:
            stack.enter_context(held(out))
            done = _finished(out)
        name = stack.enter_context(tempfile.TemporaryDirectory())
        folder = Path(name)
        random = random_model(folder / "random", model)
        for case, work in cases(model, random, folder):
            if case not in done:
                done[case] = Case.of(case, Peaks(**run_side("sides", "probe", work)))
                if out is not None:
                    lines = [json.dumps(one.as_json()) + "\n" for one in done.values()]
                    write_text(out, "".join(lines))
            progress(done[case].line())
    return summary(list(done.values()))


def _finished(out: Path) -> dict[str, Case]:
    """Return the cases in a file of an earlier call, none if it is not there."""
    records = read_records(out) if os.path.lexists(out) else ()
    finished = [Case.read(record, str(out)) for record in records]
    return {case.case: case for case in finished}


def summary(records: list[Case]) -> JsonObject:
    """Return what ``bench plan --json`` prints."""
    errors = [abs(case.error) for case in records]
    return {
        "schema_version": 1,
        "device": mx.default_device().type.name,
        "n": len(records),
        "within_15_percent": sum(error <= WITHIN for error in errors) / max(1, len(errors)),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "cases": [case.as_json() for case in records],
    }
