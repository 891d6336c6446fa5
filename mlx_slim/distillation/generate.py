"""Rows → requests → responses → training rows: the phase in which teachers write text.

Invariant: validation rows are chosen first and no teacher sees them; teachers answer one after the
other, each freed before the next is loaded; every response is on disk before the next one. Every
row and every response that is not used is counted with a reason in ``dataset.json``, which is
written last: with it, the phase is complete, and a resume asks no teacher. Try it: ``mlx-slim
distill tinyllm-openbookqa -o runs/try``.

Files in the run folder: ``answers.jsonl`` (in ``distill.cache``, where that is set), ``dataset/``
(rows of the data, of each teacher, and the validation rows), ``dataset.json``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mlx_slim import events
from mlx_slim.artifacts import SCHEMA_VERSION, hash_file, hash_json
from mlx_slim.config.distill import DistillConfig, TeacherConfig
from mlx_slim.config.expressions import compile_text
from mlx_slim.config.schema import DataConfig, Recipe
from mlx_slim.data.ledger import SourceLedger
from mlx_slim.data.split import choose_validation, quotas
from mlx_slim.distillation.answers import AnswerFile, TeacherRequest, TeacherResponse
from mlx_slim.distillation.dataset import (
    FOLDER,
    OLD_FOLDER,
    OLD_RECORD,
    RECORD,
    DatasetRecord,
    DistillationDataset,
    DroppedResponses,
    TeacherReport,
    dataset_from_record,
    read_record,
    write_dataset,
)
from mlx_slim.distillation.endpoint import EndpointTeacher
from mlx_slim.distillation.local_teacher import LocalTeacher, Teacher
from mlx_slim.distillation.queries import TeacherQuery, read_queries
from mlx_slim.distillation.teachers import name_of
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.training_rows import finder
from mlx_slim.runtime import memory_limits, resolve_dtype

ANSWERS = "answers.jsonl"
_FIRST = 5  # ids named for each reason
# Keys of distill that no text depends on; all but the first came after 0.1.
_NOT_OF_TEXTS = {"cache", "uld", "on_policy_fraction", "beta"}
_LATER_KEYS = ("learn", "seed", "split", "split_overlap")  # of the data, since 0.1


@memory_limits()
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
        ready: Called when everything is checked, before the first request.

    Raises:
        SlimError: Rows that make no request, or a teacher that does not answer; earlier
            responses stay.
    """
    config = recipe.distill
    assert config is not None
    data, seed = recipe.data, recipe.rows_seed
    answers = Path(config.cache or out) / ANSWERS
    # Older versions had no such keys: a dataset of theirs has the hash of the defaults.
    defaults = {key: DataConfig.model_fields[key].default for key in _LATER_KEYS}
    unset = {key for key, default in defaults.items() if getattr(data, key) == default}
    key = hash_json(
        {
            "method": method,
            "distill": config.model_dump(mode="json", exclude=_NOT_OF_TEXTS),
            "data": data.model_dump(mode="json", exclude=unset),
            "seed": seed,
        }
    )
    complete = _complete(out, key, answers, observer)
    if complete is not None:
        return dataset_from_record(complete, recipe, out)
    ledgers, queries = _read(data, out)
    validation = _validation(data, len(queries), seed)
    train = [query for i, query in enumerate(queries) if i not in validation]
    asking = [query for query in train if query.asks]
    if not asking:
        raise SlimError(
            f"none of the {len(train)} training rows has a question",
            "a teacher answers rows with a question; distill.method=logits takes plain text",
        )
    file = AnswerFile(answers)
    requests = _requests(config, method, asking)
    writers = [_writer(teacher, recipe) for teacher in teachers]
    _check_names([writer.name for writer in writers])
    ready()
    text = _rows_sentence(ledgers, len(validation), len(train), len(asking))
    observer.notify(events.Notice(text))
    results = [
        _ask(writer, f"teacher {number} of {len(writers)}", requests, file, observer)
        for number, writer in enumerate(writers, 1)
    ]
    for result in results:
        observer.notify(events.Notice(result.sentence, level=result.level))
    _check_usable(results, answers)
    texts = [result.texts for result in results]
    files = write_dataset(recipe, method, out, queries, validation, asking, texts)
    record = DatasetRecord(
        schema_version=SCHEMA_VERSION,
        key=key,
        method=method,
        rows_read=sum(ledger.rows_read for ledger in ledgers),
        rows_dropped=_dropped(ledgers),
        validation_rows=len(validation),
        rows_without_a_question=len(train) - len(asking),
        answers=str(answers) if config.cache else ANSWERS,
        teachers=[result.report for result in results],
        files=files,
        answers_sha256=hash_file(answers),
    )
    record.write(out)
    return dataset_from_record(record, recipe, out)


def _complete(
    out: Path, key: str, answers: Path, observer: events.Observer
) -> DatasetRecord | None:
    """Return the record of a phase that is complete, None if it must be run."""
    stored = read_record(out)
    if stored is None or not answers.is_file():
        return None
    record, file = stored
    if record.key != key or record.answers_sha256 != hash_file(answers):
        return None
    if not all((out / part.file).is_file() for part in record.files):
        return None
    if file.name == OLD_RECORD:
        text = (
            f"{file} and {OLD_FOLDER}/ are names of mlx-slim 0.1 and still read; new runs write "
            f"{RECORD} and {FOLDER}/"
        )
        observer.notify(events.Notice(text))
    return record


# ------------------------------------------------------------------------------------ the rows


def _read(data: DataConfig, out: Path) -> tuple[list[SourceLedger], list[TeacherQuery]]:
    """Return the usable rows of all sources, in order."""
    find = finder(out)
    limits = quotas(data.max_rows, [source.weight for source in data.sources])
    ledgers: list[SourceLedger] = []
    queries: list[TeacherQuery] = []
    for number, (config, limit) in enumerate(zip(data.sources, limits, strict=True)):
        source = find(config)
        ledger = SourceLedger(source.name, source.kind, config.weight, source.ignored)
        ledgers.append(ledger)
        queries += read_queries(islice(source, limit), number, config, data, ledger)
    if not queries:
        reasons = "; ".join(text for ledger in ledgers for text in ledger.reasons())
        raise SlimError(f"no row can be used: {reasons or 'there are none'}", "give other rows")
    return ledgers, queries


def _rows_sentence(
    ledgers: Sequence[SourceLedger], validation: int, train: int, asking: int
) -> str:
    """Return the counts of rows, in one line."""
    text = f"rows: {sum(ledger.rows_read for ledger in ledgers):,} read, {train:,} for training"
    notes = [f"{count:,} {reason}" for reason, count in _dropped(ledgers).items()]
    notes += [f"{validation:,} for validation"] if validation else []
    notes += [f"{train - asking:,} without a question"] if train > asking else []
    return text + (f" ({'; '.join(notes)})" if notes else "")


def _dropped(ledgers: Sequence[SourceLedger]) -> dict[str, int]:
    """Return reason -> rows, over all sources."""
    counts: Counter[str] = Counter()
    for ledger in ledgers:
        counts.update({reason: tally.count for reason, tally in ledger.dropped.items()})
    return dict(counts)


def _validation(data: DataConfig, count: int, seed: int) -> set[int]:
    """Return the numbers of the rows that are for validation."""
    if isinstance(data.validation, str):
        return set()
    return set(choose_validation(data.validation, count, seed).tolist())


# ------------------------------------------------------------------------------- one teacher


@dataclass(frozen=True)
class _TeacherResult:
    """Of one teacher: its usable texts by row (None where it has none), and its counts."""

    texts: list[str | None]
    report: TeacherReport

    @property
    def level(self) -> str:
        return "warning" if self.report.dropped or self.report.prompts_cut else "info"

    @property
    def sentence(self) -> str:
        report = self.report
        text = f"{report.teacher}: {report.used:,} of {report.asked:,} answers used"
        notes = [f"{entry.count:,} {reason}" for reason, entry in report.dropped.items()]
        notes += [f"{report.edited:,} edited by hand"] if report.edited else []
        notes += [f"{report.prompts_cut:,} prompts cut"] if report.prompts_cut else []
        return text + (f" ({'; '.join(notes)})" if notes else "")


def _ask(
    teacher: Teacher,
    title: str,
    requests: Sequence[TeacherRequest],
    file: AnswerFile,
    observer: events.Observer,
) -> _TeacherResult:
    """Send one teacher every request that the file has no response to, then free it."""
    missing = sum(file.find(teacher, request) is None for request in requests)
    text = f"{title}, {teacher.name}: {missing:,} answers to generate"
    observer.notify(events.Notice(f"{text}, {len(requests) - missing:,} cached"))

    reported = 0

    def progress(done: int, total: int) -> None:
        nonlocal reported
        if 10 * done // total > reported:
            reported = 10 * done // total
            observer.notify(events.Notice(f"teacher {teacher.name}: {10 * reported}% answered"))

    try:
        return _filtered(teacher, file.collect(teacher, requests, progress))
    finally:
        teacher.close()


def _requests(
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
            f"two teachers are called {twice[0]}, but answers are stored by name",
            "give each a name: distill.teachers=[{model: …, name: …}, …]",
        )


def _filtered(teacher: Teacher, responses: Sequence[TeacherResponse]) -> _TeacherResult:
    """Separate usable responses from others, and count both."""
    dropped: dict[str, list[str]] = {}
    texts: list[str | None] = []
    for response in responses:
        problem = response.problem
        texts.append(None if problem else response.generation)
        if problem:
            dropped.setdefault(problem, []).append(response.id)
    report = TeacherReport(
        teacher=teacher.name,
        asked=len(responses),
        used=sum(text is not None for text in texts),
        edited=sum(response.edited for response in responses),
        prompts_cut=teacher.truncated,
        dropped={why: DroppedResponses(len(ids), ids[:_FIRST]) for why, ids in dropped.items()},
    )
    return _TeacherResult(texts, report)


def _check_usable(results: Sequence[_TeacherResult], answers: Path) -> None:
    for result in results:
        if not result.report.used:
            raise SlimError(
                f"no answer can be used: {result.sentence}",
                f"look at {answers}; raise distill.ask.max_tokens, set distill.ask.until, or take "
                "another teacher",
            )
