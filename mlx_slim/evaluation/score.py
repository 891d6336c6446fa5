"""One model on all its tasks: the loop over chunks, on one process or several.

Invariant: ranks take the chunks in turn, and rank 0 writes them in order, so the files do not
depend on the number of ranks. Used by ``evaluation/run.py``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import mlx.core as mx

from mlx_slim import artifacts, events, progress, runtime
from mlx_slim.adapters.stack import Weighted, load_adapters, used_folders
from mlx_slim.agreement import first, gather, on_every_rank
from mlx_slim.evaluation.divided import load_divided
from mlx_slim.evaluation.figures import Summary
from mlx_slim.evaluation.jobs import Engine, ScoringJob, TaskJob
from mlx_slim.evaluation.records import TEXT, EvalResults, EvalState, Timing, TrainedOn
from mlx_slim.evaluation.results import RESULTS, Entry, Folder, read_results, samples_name
from mlx_slim.evaluation.rounds import rounds
from mlx_slim.evaluation.scoring.loglikelihood import MEMORY, LoglikelihoodScorer
from mlx_slim.evaluation.tasks.metrics import Record
from mlx_slim.models.half_weights import widen
from mlx_slim.models.kv_cache import cache_format
from mlx_slim.models.load import Loaded
from mlx_slim.models.parallel import Split
from mlx_slim.models.quantized import densify, densify_pays
from mlx_slim.quantization.base import load_base
from mlx_slim.reading import JsonObject
from mlx_slim.run_dir import RunDir

_NOT_TOLD = {"tasks", "code", "cache_bytes"}  # of the state, in results.json


@dataclass
class Target:
    """A model that will be scored; nothing of it is loaded yet.

    Attributes:
        source: Folder or hub id, as given.
        revision: Branch, tag or commit of a hub id.
        adapter: Its adapters in words, or None.
        stack: Those adapters.
        split: How the ranks divide the model; None gives each all of it, and its own questions.
        dtype: To compute in.
        half_blocks: Whether weights stay in 16 bits (``models/half_weights.py``).
        may_widen: Whether they fit in float32 too, for models that are slow so.
        trust_remote_code: Run Python files that the repository brings.
        batch_tokens: Tokens of a batch, or None.
        notes: Notices about the prompts.
        memory: Limit of weights, caches and activations, bytes.
        jobs: Tasks and texts.
        folder: Where the results go.
        started: Whether the folder holds an evaluation to resume (on rank 0).
        state: What a resume must match.
        trained_on: Task -> how many of its questions the model was trained on.
    """

    source: str
    revision: str | None
    adapter: str | None
    stack: list[Weighted]
    split: Split | None
    dtype: mx.Dtype
    half_blocks: bool
    may_widen: bool
    trust_remote_code: bool
    batch_tokens: int | None
    notes: list[str]
    memory: int
    jobs: list[ScoringJob]
    folder: Path
    started: bool
    state: EvalState
    trained_on: dict[str, TrainedOn] = field(default_factory=dict)


@runtime.memory_limits()
def score(target: Target, observer: events.Observer) -> JsonObject:
    """Score one model; write its folder on rank 0.

    Args:
        target: The model and its tasks.
        observer: Hears of progress.

    Returns:
        The results, the same on every rank.

    Raises:
        SlimError: The model or the adapter cannot be used, or a score is not finite.
        ResourceError: Out of disk.
    """
    leads = runtime.world().rank() == 0
    folder = Folder(target.folder)
    complete: JsonObject = {}
    if leads and folder.complete:
        with RunDir(target.folder, RESULTS).claim(resume=True):
            pass  # temporary files of a killed process are removed
        observer.notify(events.Notice(f"{target.folder} is complete: nothing to do"))
        complete = read_results(target.folder)
    if complete := first(complete):
        _say_cut(target, complete, observer)
        return complete
    for name, seen in target.trained_on.items():
        num_questions = next(job.chunks[-1].stop for job in target.jobs if job.name == name)
        text = f"{name}: {seen.questions} of the {num_questions} questions were trained on in "
        observer.notify(events.Notice(text + ", ".join(seen.runs), level="warning"))
    engine = _load(target, observer)
    if not leads:
        done = first({})
        for job in target.jobs:
            for _ in rounds(job, engine, done[job.name]):
                pass
        return first({})
    with folder.open(target.state, target.started):
        first({job.name: folder.done(job.name) for job in target.jobs})
        watch = _Watch(target, folder, observer)
        for job in target.jobs:
            watch.begin(job)
            with progress.listening(watch):
                for packed_chunks, seconds in rounds(job, engine, folder.done(job.name)):
                    watch.append(job, packed_chunks, seconds)
            watch.end(job)
        results = _results(target, folder)
        folder.finish(results, _timings(target, folder))
    _say_cut(target, results, observer)
    observer.notify(watch.done())
    return first(results)


def _say_cut(target: Target, results: JsonObject, observer: events.Observer) -> None:
    """Warn of each task whose prompts were cut to fit."""
    sections = EvalResults.read(results, str(target.folder)).tasks
    for job in target.jobs:
        if isinstance(job, TaskJob) and (truncated := sections[job.name].truncated):
            observer.notify(events.Notice(job.cut_note(truncated), level="warning"))


def _load(target: Target, observer: events.Observer) -> Engine:
    """Load model and adapter.

    Whether to dequantize, and the bytes of caches, are decided once and kept for a resume.
    """
    from mlx_slim.evaluation.scoring.answer_cache import joins  # imports mlx-lm

    observer.notify(events.Notice(f"loading {target.source}"))
    loaded, dense = _opened(target)
    bits = target.state.kv_bits
    kv_format = None if bits is None else cache_format(loaded.model, bits, target.source)
    scorer = LoglikelihoodScorer(
        loaded.model, batch_tokens=target.batch_tokens, kv_format=kv_format
    )
    if target.half_blocks and target.may_widen and not scorer.lists:
        widen(loaded.model)
    cache_bytes = target.state.cache_bytes
    if cache_bytes is None:
        left = min(gather(max(1, target.memory - mx.get_active_memory())))
        cache_bytes = 1 << (left.bit_length() - 1)  # usually the same power of two in every run
    cache_bytes = first(cache_bytes)
    target.state = replace(target.state, dense=dense, cache_bytes=cache_bytes)
    scorer.memory = min(MEMORY, cache_bytes // 2)
    notes = [*target.notes, *loaded.notes, *scorer.notes]
    generates = any(isinstance(job, TaskJob) and job.generates for job in target.jobs)
    if generates and not joins(loaded.model):
        notes.append(
            "answers are generated one at a time: this model's results change with padding"
        )
    for note in notes:
        observer.notify(events.Notice(note))
    return Engine(
        loaded.model, loaded.tokenizer, scorer, cache_bytes, target.batch_tokens, kv_format
    )


def _opened(target: Target) -> tuple[Loaded, bool]:
    """Return the model with its adapters, and whether its quantized layers were dequantized."""
    dense = first(target.state.dense)
    if target.split is not None:
        return load_divided(
            target.source,
            target.split,
            target.stack,
            memory=target.memory,
            dense=dense,
            revision=target.revision,
            dtype=target.dtype,
            trust_remote_code=target.trust_remote_code,
        )
    loaded = on_every_rank(
        lambda: load_base(
            target.source,
            used_folders(target.stack),
            revision=target.revision,
            dtype=target.dtype,
            trust_remote_code=target.trust_remote_code,
            half_blocks=target.half_blocks,
        )
    )
    dense = first(densify_pays(loaded.model) if dense is None else dense)
    if dense:
        densify(loaded.model)
    if target.stack:
        load_adapters(loaded.model, target.stack)
    return loaded, dense


class _Watch:
    """Writes chunks as they are computed, and reports progress."""

    def __init__(self, target: Target, folder: Folder, observer: events.Observer) -> None:
        self._folder, self._observer, self._target = folder, observer, target
        self._weights = {job.name: list(map(job.weight, job.chunks)) for job in target.jobs}
        self._total = sum(map(sum, self._weights.values()))
        self._records: list[Record] = []
        self._job: ScoringJob | None = None
        answered = sum(self._answered(job) for job in target.jobs)
        observer.notify(
            events.EvalStarted(
                model=target.source,
                adapter=target.adapter,
                tasks=tuple(job.name for job in target.jobs),
                questions=sum(job.chunks[-1].stop for job in target.jobs),
                answered=answered,
                fraction=self._fraction(),
                budget_bytes=runtime.device_memory(),
            )
        )

    def _answered(self, job: ScoringJob) -> int:
        done = self._folder.done(job.name)
        return job.chunks[done - 1].stop if done else 0

    def _fraction(self) -> float:
        done = {name: self._folder.done(name) for name in self._weights}
        finished = sum(sum(weights[: done[name]]) for name, weights in self._weights.items())
        return finished / self._total

    def begin(self, job: ScoringJob) -> None:
        """Start a task, or resume it."""
        self._job = job
        self._records = self._folder.records(job.name)

    def notify(self, event: events.Event) -> None:
        """Report progress within the current chunk.

        Other ranks are assumed to have progressed as far as this one.
        """
        if self._job is None or not isinstance(event, events.StageProgress) or not event.total:
            return
        job, done = self._job, self._folder.done(self._job.name)
        chunks = job.chunks[done : done + (1 if self._target.split else runtime.world().size())]
        part = min(1.0, event.done / event.total)
        weight = sum(self._weights[job.name][done : done + len(chunks)]) / self._total
        self._observer.notify(
            events.EvalAnswering(
                task=job.name,
                answered=self._answered(job) + int(part * sum(map(len, chunks))),
                questions=job.chunks[-1].stop,
                fraction=self._fraction() + part * weight,
            )
        )

    def append(self, job: ScoringJob, packed_chunks: Sequence[bytes], seconds: float) -> None:
        """Write the chunks of one round."""
        computed = 0
        for part in packed_chunks:
            head, data = part.split(b"\n", 1)
            entry = self._folder.append(job.name, data, **json.loads(head), seconds=seconds)
            self._records += [json.loads(line) for _, line in artifacts.json_lines(data)]
            computed += entry.tokens_computed
        metric, value = job.running(self._records)
        self._observer.notify(
            events.EvalProgress(
                task=job.name,
                answered=self._answered(job),
                questions=job.chunks[-1].stop,
                metric=metric,
                value=value,
                fraction=self._fraction(),
                tokens_per_second=computed / max(seconds * len(packed_chunks), 1e-9),
                active_memory_bytes=mx.get_active_memory(),
                peak_memory_bytes=_peak(self._folder),
            )
        )

    def end(self, job: ScoringJob) -> None:
        """Report the score of a task."""
        summary = job.summarize(self._folder.records(job.name))
        measured = timing(self._folder.entries[job.name])
        self._observer.notify(
            events.TaskDone(
                task=job.name,
                num_fewshot=job.num_fewshot if isinstance(job, TaskJob) else None,
                n=summary.n,
                metrics=summary.as_json()["metrics"],
                seconds=measured.seconds,
                tokens_per_second=measured.tokens_per_second,
                peak_memory_bytes=measured.peak_memory_bytes,
            )
        )

    def done(self) -> events.EvalDone:
        """Return the last event."""
        entries = [
            entry for task_entries in self._folder.entries.values() for entry in task_entries
        ]
        return events.EvalDone(
            model=self._target.source,
            path=str(self._folder.path),
            seconds=sum(entry.seconds for entry in entries),
            peak_memory_bytes=_peak(self._folder),
        )


def _peak(folder: Folder) -> int:
    return max(
        entry.peak_memory_bytes
        for task_entries in folder.entries.values()
        for entry in task_entries
    )


def timing(entries: Sequence[Entry]) -> Timing:
    """Return what differs between runs."""
    seconds = sum(entry.seconds for entry in entries)
    computed, _ = _tokens(entries)
    peak = max(entry.peak_memory_bytes for entry in entries)
    return Timing(seconds, computed / max(seconds, 1e-9), peak)


def _tokens(entries: Sequence[Entry]) -> tuple[int, int]:
    """Return tokens computed and the fewest possible; a subject's common prefix counts once."""
    roots: dict[str, int] = {}
    for entry in entries:
        roots[entry.group] = max(entry.root, roots.get(entry.group, 0))
    shared = sum(roots.values())
    computed = sum(entry.tokens_computed for entry in entries)
    return computed + shared, sum(entry.tokens_minimum for entry in entries) + shared


def _section(job: ScoringJob, folder: Folder) -> JsonObject:
    """Return a task's part of ``results.json``."""
    summary = job.summarize(folder.records(job.name))
    samples = folder.path / samples_name(job.name)
    return section(job.describe(), summary, folder.entries[job.name], samples)


def told(state: JsonObject) -> JsonObject:
    """Return what ``results.json`` says of the settings; a cache that is not quantized: nothing."""
    left_out = _NOT_TOLD | ({"kv_bits"} if state.get("kv_bits") is None else set())
    return {key: value for key, value in state.items() if key not in left_out}


def section(
    description: JsonObject, summary: Summary, entries: Sequence[Entry], samples: Path
) -> JsonObject:
    """Return a task's part of ``results.json`` from what is stored.

    Args:
        description: What a resume must match.
        summary: The figures over its records.
        entries: Its chunks.
        samples: The file of its records.
    """
    computed, fewest = _tokens(entries)
    return {
        **description,
        **summary.as_json(),
        "seconds": sum(entry.seconds for entry in entries),
        "tokens_computed": computed,
        "tokens_minimum": fewest,
        "truncated": sum(entry.truncated for entry in entries),
        "samples_sha256": artifacts.hash_file(samples),
    }


def _results(target: Target, folder: Folder) -> JsonObject:
    """Return ``results.json``: only ``seconds`` differs between runs."""
    sections = {job.name: _section(job, folder) for job in target.jobs}
    for name, seen in target.trained_on.items():
        sections[name]["trained_on"] = asdict(seen)
    texts = {name: sections.pop(name) for name in list(sections) if name == TEXT}
    return {**told(asdict(target.state)), "tasks": sections, **texts}


def _timings(target: Target, folder: Folder) -> JsonObject:
    """Return ``timings.json``."""
    return {
        "schema_version": artifacts.SCHEMA_VERSION,
        "ranks": runtime.world().size(),
        **({"parallel": target.split} if target.split else {}),
        "tasks": {job.name: asdict(timing(folder.entries[job.name])) for job in target.jobs},
    }
