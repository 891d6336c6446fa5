"""The teaching phase of teachers that write text: rows → questions → answers → training rows.

Invariant: held-out rows are chosen first and no teacher is asked about them; teachers are asked one
after the other, each let go of before the next; every answer is on disk as it comes. Every row and
every answer that is not used is counted with a reason in ``teaching.json``, which is written last:
with it, the phase is complete, and a resume asks no teacher. Used by ``mlx-slim distill``.

Files in the run folder: ``answers.jsonl`` (in ``distill.cache``, where that is set), ``dataset/``
(rows of the data, of each teacher, and the held-out ones), ``teaching.json``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_slim import events
from mlx_slim.artifacts import (
    SCHEMA_VERSION,
    hash_file,
    hash_json,
    write_json,
)
from mlx_slim.config.distill import DistillConfig, TeacherConfig
from mlx_slim.config.expressions import compile_text
from mlx_slim.config.schema import DataConfig, Recipe
from mlx_slim.data.ledger import SourceLedger
from mlx_slim.data.split import choose_validation, quotas
from mlx_slim.distillation.answers import AnswerFile, TeacherRequest, TeacherResponse
from mlx_slim.distillation.dataset import DistillationDataset, dataset_from_record, write_dataset
from mlx_slim.distillation.endpoint import EndpointTeacher
from mlx_slim.distillation.local_teacher import LocalTeacher, Teacher
from mlx_slim.distillation.queries import TeacherQuery, read_queries
from mlx_slim.distillation.teachers import name_of
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.training_rows import finder
from mlx_slim.reading import library_errors, read_object, short
from mlx_slim.runtime import resolve_dtype

ANSWERS = "answers.jsonl"
RECORD = "teaching.json"
_FIRST = 5  # ids named for each reason


def generate_dataset(
    recipe: Recipe,
    teachers: Sequence[TeacherConfig],
    method: str,
    out: Path,
    observer: events.Observer,
    ready: Callable[[], None] = lambda: None,
) -> DistillationDataset:
    """Let the teachers of ``recipe`` write, and return what the student learns.

    Args:
        recipe: With a ``distill`` section.
        teachers: Its teachers, each with its model.
        method: ``sequence`` or ``rationales``.
        out: The run folder, which exists.
        observer: Hears of progress and counts.
        ready: Called when everything is checked, before the first question is asked.

    Raises:
        SlimError: Rows that cannot be asked about, or a teacher that does not answer; what was
            answered before stays.
    """
    config = recipe.distill
    assert config is not None
    data, seed = recipe.data, recipe.train.seed
    answers = Path(config.cache or out) / ANSWERS
    key = hash_json(
        {
            "method": method,
            "distill": config.model_dump(mode="json", exclude={"cache"}),
            "data": data.model_dump(mode="json"),
            "seed": seed,
        }
    )
    known = _complete(out, key, answers)
    if known is not None:
        return dataset_from_record(known, recipe, out)
    ledgers, queries = _read(data, out)
    held_out = _held_out(data, len(queries), seed)
    train = [query for i, query in enumerate(queries) if i not in held_out]
    asking = [query for query in train if query.asks]
    if not asking:
        raise SlimError(
            f"none of the {len(train)} training rows asks anything",
            "a teacher answers rows with a question; distill.method=logits takes plain text",
        )
    file = AnswerFile(answers)
    questions = _questions(config, method, asking)
    writers = [_writer(teacher, recipe) for teacher in teachers]
    _check_names([writer.name for writer in writers])
    ready()
    observer.notify(events.Notice(_rows_sentence(ledgers, len(held_out), len(train), len(asking))))
    written = [
        _ask(writer, f"teacher {number} of {len(writers)}", questions, file, observer)
        for number, writer in enumerate(writers, 1)
    ]
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "key": key,
        "method": method,
        "rows_given": sum(ledger.given for ledger in ledgers),
        "rows_dropped": _dropped(ledgers),
        "rows_held_out": len(held_out),
        "rows_without_a_question": len(train) - len(asking),
        "answers": str(answers) if config.cache else ANSWERS,
    }
    report["teachers"] = [part.report for part in written]
    for part in written:
        observer.notify(events.Notice(part.sentence, level=part.level))
    _check_usable(written, answers)
    report["parts"] = write_dataset(
        recipe, method, out, queries, held_out, asking, [part.by_id for part in written]
    )
    report["answers_sha256"] = hash_file(answers)
    write_json(out / RECORD, report)
    return dataset_from_record(report, recipe, out)


def _complete(out: Path, key: str, answers: Path) -> dict[str, Any] | None:
    """Return the record of a phase that is complete, None if it must be gone through."""
    if not (out / RECORD).is_file() or not answers.is_file():
        return None
    record = read_object(out / RECORD, key=str, answers_sha256=str, parts=list)
    same = record["key"] == key and record["answers_sha256"] == hash_file(answers)
    with library_errors(f"{short(out / RECORD)} is damaged", "remove it: it is made again"):
        files = [out / part["file"] for part in record["parts"]]
    return record if same and all(file.is_file() for file in files) else None


# ------------------------------------------------------------------------------------ the rows


def _read(data: DataConfig, out: Path) -> tuple[list[SourceLedger], list[TeacherQuery]]:
    """Return the usable rows of all sources, in order."""
    find = finder(out)
    shares = quotas(data.max_rows, [source.weight for source in data.sources])
    ledgers: list[SourceLedger] = []
    queries: list[TeacherQuery] = []
    for number, (config, quota) in enumerate(zip(data.sources, shares, strict=True)):
        source = find(config)
        ledger = SourceLedger(source.name, source.kind, config.weight, source.ignored)
        ledgers.append(ledger)
        queries += read_queries(islice(source, quota), number, config, data, ledger)
    if not queries:
        reasons = "; ".join(text for ledger in ledgers for text in ledger.reasons())
        raise SlimError(f"no row can be used: {reasons or 'none given'}", "give other rows")
    return ledgers, queries


def _rows_sentence(ledgers: Sequence[SourceLedger], held_out: int, train: int, asking: int) -> str:
    """Return what became of the rows, in one line."""
    text = f"rows: {sum(ledger.given for ledger in ledgers):,} given, {train:,} to learn"
    notes = [f"{count:,} {reason}" for reason, count in _dropped(ledgers).items()]
    notes += [f"{held_out:,} held out"] if held_out else []
    notes += [f"{train - asking:,} ask nothing"] if train > asking else []
    return text + (f" ({'; '.join(notes)})" if notes else "")


def _dropped(ledgers: Sequence[SourceLedger]) -> dict[str, int]:
    """Return reason -> rows, over all sources."""
    counts: Counter[str] = Counter()
    for ledger in ledgers:
        counts.update({reason: tally.count for reason, tally in ledger.dropped.items()})
    return dict(counts)


def _held_out(data: DataConfig, count: int, seed: int) -> set[int]:
    if isinstance(data.validation, str):
        return set()
    return set(choose_validation(data.validation, count, seed).tolist())


# ------------------------------------------------------------------------------- one teacher


@dataclass(frozen=True)
class _Teaching:
    """What one teacher gave: its usable answers by row, and its counts."""

    by_id: list[str | None]
    report: dict[str, Any]

    @property
    def level(self) -> str:
        return "warning" if self.report["dropped"] or self.report["prompts_cut"] else "info"

    @property
    def sentence(self) -> str:
        found = self.report
        text = f"{found['teacher']}: {found['used']:,} of {found['asked']:,} answers used"
        notes = [f"{entry['count']:,} {reason}" for reason, entry in found["dropped"].items()]
        notes += [f"{found['edited']:,} edited by hand"] if found["edited"] else []
        notes += [f"{found['prompts_cut']:,} prompts cut"] if found["prompts_cut"] else []
        return text + (f" ({'; '.join(notes)})" if notes else "")


def _ask(
    teacher: Teacher,
    title: str,
    questions: Sequence[TeacherRequest],
    file: AnswerFile,
    observer: events.Observer,
) -> _Teaching:
    """Ask one teacher everything that is not in the file, and let go of it."""
    missing = sum(file.find(teacher, question) is None for question in questions)
    text = f"{title}, {teacher.name}: {missing:,} answers to write"
    observer.notify(events.Notice(f"{text}, {len(questions) - missing:,} kept"))

    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if 10 * done // total > told:
            told = 10 * done // total
            observer.notify(events.Notice(f"teacher {teacher.name}: {10 * told}% answered"))

    try:
        return _sifted(teacher, file.collect(teacher, questions, progress))
    finally:
        teacher.close()


def _questions(
    distill: DistillConfig, method: str, queries: Sequence[TeacherQuery]
) -> list[TeacherRequest]:
    if method == "sequence":
        return [query.sequence() for query in queries]
    template = compile_text(distill.ask.prompt)
    return [query.rationale(template) for query in queries]


def _writer(config: TeacherConfig, recipe: Recipe) -> Teacher:
    """Return the teacher, checked; nothing heavy is loaded."""
    assert recipe.distill is not None
    ask = recipe.distill.ask
    if config.base_url is None:
        dtype = resolve_dtype(recipe.train.dtype)
        return LocalTeacher(config, dtype=dtype, max_tokens=ask.max_tokens, until=ask.until)
    return EndpointTeacher(
        name_of(config),
        config.base_url,
        config.model or "",
        api_key_env=config.api_key_env,
        max_tokens=ask.max_tokens,
        until=ask.until,
        concurrency=ask.concurrency,
        timeout=ask.timeout,
        retries=ask.retries,
    )


def _check_names(names: Sequence[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise SlimError(
            f"two teachers are called {twice[0]}, and their answers stand in one file",
            "give each a name: distill.teachers=[{model: …, name: …}, …]",
        )


def _sifted(teacher: Teacher, written: Sequence[TeacherResponse]) -> _Teaching:
    """Part good answers from others, and count both."""
    dropped: dict[str, dict[str, Any]] = {}
    texts: list[str | None] = []
    for answer in written:
        trouble = answer.trouble
        texts.append(None if trouble else answer.generation)
        if trouble:
            entry = dropped.setdefault(trouble, {"count": 0, "first": []})
            entry["count"] += 1
            entry["first"] = [*entry["first"], answer.id][:_FIRST]
    report = {
        "teacher": teacher.name,
        "asked": len(written),
        "used": sum(text is not None for text in texts),
        "edited": sum(answer.edited for answer in written),
        "prompts_cut": teacher.truncated,
        "dropped": dropped,
    }
    return _Teaching(texts, report)


def _check_usable(written: Sequence[_Teaching], answers: Path) -> None:
    for part in written:
        if not part.report["used"]:
            raise SlimError(
                f"nothing to learn from {part.sentence}",
                f"look at {answers}; raise distill.ask.max_tokens, name distill.ask.until, or take "
                "another teacher",
            )
