"""Answers to a few validation rows, before and after training, for the page of a run.

Invariant: they change nothing: random state, weights and mode of the model are what they were
before, so a run takes the same steps with and without them. One model is in memory: what is trained
answers before its first step (its adapters do nothing yet), and what was saved answers when it is
loaded again to be checked. Answers are greedy and short. Try it:
``mlx-slim train smollm2-lora -o runs/try`` and open ``runs/try/report.html``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.artifacts import SCHEMA_VERSION, write_json
from mlx_slim.finetuning.prompts import split, unchanged
from mlx_slim.finetuning.run_dir import ANSWERS_FILE
from mlx_slim.progress import stage
from mlx_slim.reading import JsonObject, field, read_object, short

if TYPE_CHECKING:  # the page of a run is written without what trains one
    from mlx_slim.data.store import TokenStore

MAX_TOKENS = 64  # of an answer, at most
LONGEST_PROMPT = 512  # tokens: a longer row is passed over


def choose(rows: TokenStore, count: int) -> list[tuple[list[int], list[int]]]:
    """Return prompt and reference of the first ``count`` rows whose prompts are short enough."""
    chosen: list[tuple[list[int], list[int]]] = []
    for number in range(len(rows)):
        if len(chosen) == count:
            break
        prompt, reference = split(*rows.row(number))
        if len(prompt) <= LONGEST_PROMPT:
            chosen.append((prompt, reference))
    return chosen


@dataclass(frozen=True)
class Answered:
    """A prompt with its reference, and what both models answered."""

    prompt: str
    reference: str
    before: str
    after: str


def write_answers(out: Path, rows: Sequence[Answered]) -> None:
    """Write ``answers.json`` of a run whose validation rows were answered elsewhere."""
    record = {"schema_version": SCHEMA_VERSION, "max_tokens": MAX_TOKENS, "skipped": None}
    write_json(out / ANSWERS_FILE, {**record, "rows": [asdict(row) for row in rows]})


def answer_before(
    out: Path,
    model: nn.Module,
    tokenizer: Any,
    rows: TokenStore | None,
    count: int,
    budget: int,
) -> None:
    """Write ``answers.json`` with the answers of a model that has learned nothing yet.

    Where there are none, it says why.

    Args:
        out: The run folder.
        model: Not changed.
        tokenizer: Its tokenizer.
        rows: Validation rows, or None.
        count: Of them to answer.
        budget: Memory that the run may use, bytes.
    """
    chosen = choose(rows, count) if rows is not None else []
    record: JsonObject = {
        "schema_version": SCHEMA_VERSION,
        "max_tokens": _most_tokens(chosen),
        "skipped": _why_none(rows, count, chosen),
        "rows": [],
    }
    if chosen:
        from mlx_slim.data.tokenize import unwrap

        decode = unwrap(tokenizer).decode
        most = record["max_tokens"]
        answers, trouble = _answers("before training", model, tokenizer, chosen, budget, most)
        record["skipped"] = trouble
        record["rows"] = [
            {
                "prompt": decode(prompt, skip_special_tokens=True).strip(),
                "reference": decode(reference[:MAX_TOKENS], skip_special_tokens=True),
                "before": before,
                "after": None,
            }
            for (prompt, reference), before in zip(chosen, answers, strict=False)
        ]
    write_json(out / ANSWERS_FILE, record)


def answer_after(
    out: Path, model: nn.Module, tokenizer: Any, rows: TokenStore | None, budget: int
) -> None:
    """Add the answers of the tuned ``model`` to ``answers.json``, where there are some."""
    file = out / ANSWERS_FILE
    if rows is None or not file.exists() or not (record := read_object(file, rows=list))["rows"]:
        return
    field(record, short(file), "rows", list, of=dict)
    chosen = choose(rows, len(record["rows"]))
    most = field(record, short(file), "max_tokens", int, MAX_TOKENS, low=1)
    answers, trouble = _answers("after training", model, tokenizer, chosen, budget, most)
    record["skipped"] = trouble
    for row, answer in zip(record["rows"], answers, strict=False):
        row["after"] = answer
    write_json(file, record)


def _most_tokens(chosen: Sequence[tuple[list[int], list[int]]]) -> int:
    """Return how long an answer may get: twice its reference, so that short tasks stay cheap."""
    return min(MAX_TOKENS, 8 + 2 * max((len(reference) for _, reference in chosen), default=0))


def _why_none(rows: TokenStore | None, count: int, chosen: Sequence[object]) -> str | None:
    if chosen:
        return None
    if not count:
        return "report_answers is 0"
    if rows is None:
        return "there are no validation rows (data.validation is 0)"
    return f"every validation row has a prompt of more than {LONGEST_PROMPT} tokens"


def _answers(
    when: str,
    model: nn.Module,
    tokenizer: Any,
    chosen: Sequence[tuple[list[int], list[int]]],
    budget: int,
    most_tokens: int,
) -> tuple[list[str], str | None]:
    """Return one text a prompt, or why there is none."""
    from mlx_slim.evaluation.scoring.generate import generate_batch  # imports mlx-lm

    prompts = [prompt for prompt, _ in chosen]
    room = max(1, budget - mx.get_active_memory())
    try:
        with unchanged(model), stage(f"answering {len(prompts)} validation rows {when}"):
            answers = generate_batch(model, tokenizer, prompts, most_tokens, cache_bytes=room)
    except Exception as error:  # of a model that cannot generate: not worth a run
        return [], " ".join(f"the model gave no answer: {type(error).__name__}: {error}".split())
    return [one.text for one in answers], None
