"""The plan of an evaluation: models, tasks and options, checked.

Invariant: nothing is written and no weight is read here; what passes can be scored, unless an
adapter does not fit its model. Used by ``evaluation/run.py``.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_slim import artifacts, runtime
from mlx_slim.adapters.stack import parse_adapters
from mlx_slim.adapters.store import adapter_hash, check_adapter
from mlx_slim.data.templates import load_template
from mlx_slim.data.tokenize import unwrap
from mlx_slim.errors import ResourceError, RowLimit, SlimError, did_you_mean
from mlx_slim.evaluation.divided import chosen_split, rank_bytes
from mlx_slim.evaluation.jobs import ScoringJob, TaskJob
from mlx_slim.evaluation.options import EvalOptions
from mlx_slim.evaluation.records import TEXT, EvalState, TrainedOn
from mlx_slim.evaluation.results import RESULTS, STATE_FILE, Folder
from mlx_slim.evaluation.score import Target
from mlx_slim.evaluation.scoring.documents import DocumentsJob
from mlx_slim.evaluation.scoring.footprint import planned_footprint
from mlx_slim.evaluation.scoring.perplexity import TextDocuments, TextJob, read_texts
from mlx_slim.evaluation.scoring.requests import RequestEncoder, max_length
from mlx_slim.evaluation.tasks.prompts import Chat, Question, build_questions
from mlx_slim.evaluation.tasks.rows import TaskRows, load_rows, shots_checksum
from mlx_slim.evaluation.tasks.spec import Selection, expand
from mlx_slim.evaluation.tasks.training_rows import question_keys
from mlx_slim.models.build import build
from mlx_slim.models.half_weights import half_numbers
from mlx_slim.models.kv_cache import cache_format
from mlx_slim.models.lineage import trained_keys
from mlx_slim.models.load import load_tokenizer, model_hash, read_config, resolve
from mlx_slim.models.row_limits import row_limit
from mlx_slim.models.tensors import folder_tensors
from mlx_slim.reading import JsonObject, field, read_object, short
from mlx_slim.run_dir import RunDir
from mlx_slim.units import human_bytes

CODE = 4  # raised when the same settings give other numbers: an older folder is not resumed
_SAMPLE_BYTES = 500  # approximate size of a question on disk
_MIN_DISK = 200_000  # the other files


def find_targets(
    sources: list[str],
    names: list[str],
    out: Path,
    options: EvalOptions,
    resume: bool,
    memory: int,
) -> list[Target]:
    """Return what will be scored, all of it checked; nothing is written and no weight is read.

    Args:
        sources: Folders or hub ids.
        names: Tasks, suites, task files.
        out: The output folder.
        options: Of the command.
        resume: Whether ``out`` may hold an evaluation to resume.
        memory: Bytes that each rank can have.

    Raises:
        SlimError: Whatever is wrong with the input.
        ResourceError: If memory or disk cannot suffice.
    """
    _check_options(sources, names, options)
    first = runtime.world().rank() == 0
    folders = result_folders(sources, out)
    started = _check_folders(out, folders, resume) if first else [False] * len(folders)
    tasks = read_tasks(names, options)
    texts = None if options.perplexity is None else read_texts(options.perplexity)
    configs = [read_config(source, options.revision) for source in sources]
    for one in parse_adapters(options.adapter):
        check_adapter(one.folder)
    targets = []
    for source, config, folder, begun in zip(sources, configs, folders, started, strict=True):
        target = _target(source, config, tasks, texts, options, memory)
        target.folder, target.started = folder, begun
        if begun:
            stored = read_object(folder / STATE_FILE)
            where = short(folder / STATE_FILE)
            target.state = replace(
                target.state,
                dense=field(stored, where, "dense", bool, None),
                cache_bytes=field(stored, where, "cache_bytes", int, None),
            )
            Folder(folder).match(target.state)
        targets.append(target)
    _check_disk(out, [job for target in targets for job in target.jobs])
    return targets


def _check_options(sources: list[str], names: list[str], options: EvalOptions) -> None:
    if not sources:
        raise SlimError("no model to score", "give a folder or a hub id")
    if twice := [source for source, count in Counter(sources).items() if count > 1]:
        raise SlimError(f"{twice[0]} is given twice", "name every model once")
    if not names and options.perplexity is None:
        raise SlimError("nothing to score", "give --task NAMES, --perplexity FILE, or both")
    if options.system is not None and not options.system.strip():
        raise SlimError(
            f"the system message {options.system!r} is empty", "leave --system out for none"
        )
    if options.system is not None and not names:
        raise SlimError(
            "--system is used only in prompts of tasks, and no task is named",
            "add --task, or leave it out",
        )
    if options.dtype not in ("auto", *runtime.DTYPES):
        choices = ("auto", *runtime.DTYPES)
        raise SlimError(f"unknown dtype {options.dtype!r}", did_you_mean(options.dtype, choices))
    for name in ("limit", "max_length", "batch_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise SlimError(f"{name} is {value}, expected at least 1", "leave it out for all")


def _check_folders(out: Path, folders: list[Path], resume: bool) -> list[bool]:
    """Return for each folder whether it holds an evaluation to resume."""
    if folders == [out]:
        return [RunDir(out, RESULTS).check(resume=resume)]
    if (out / STATE_FILE).exists():
        raise SlimError(
            f"{out} holds the results of one model, and {len(folders)} are given",
            "choose another output folder",
        )
    present = [folder.exists() and any(folder.iterdir()) for folder in folders]
    if not any(present):
        RunDir(out, RESULTS).check(resume=resume)
    return [
        RunDir(folder, RESULTS).check(resume=resume) if is_there else False
        for folder, is_there in zip(folders, present, strict=True)
    ]


def result_folders(sources: Sequence[str], out: Path) -> list[Path]:
    """Return where each model's results go: ``out``, or inside it where there are several.

    A folder is named by the last part of its model, made safe, and numbered where two are alike.
    """
    if len(sources) == 1:
        return [out]
    names: list[str] = []
    for source in sources:
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).expanduser().resolve().name)
        base = base.strip(".-") or "model"
        tries = (base if n == 1 else f"{base}-{n}" for n in itertools.count(1))
        taken = {name.lower() for name in names}
        names.append(next(name for name in tries if name.lower() not in taken))
    return [out / name for name in names]


@dataclass(frozen=True)
class TaskQuestions:
    """A task with its rows; no model is needed for it.

    Attributes:
        selection: The task and its shots.
        rows: Its rows.
        questions: Prompts without a chat template.
    """

    selection: Selection
    rows: TaskRows
    questions: list[Question]


def read_tasks(names: list[str], options: EvalOptions) -> list[TaskQuestions]:
    """Return the tasks and suites ``names`` with their rows, every prompt rendered.

    Raises:
        SlimError: Unknown names, data that cannot be had, or rows that do not fit.
    """
    tasks = []
    for selection in expand(names, options.num_fewshot) if names else []:
        if selection.task.name == TEXT:
            raise SlimError(f"a task may not be called {TEXT}", "rename it: set name in its file")
        rows = load_rows(selection.task, options.data_dir, selection.sampling)
        questions = build_questions(
            selection.task,
            rows,
            selection.num_fewshot,
            options.limit,
            sampling=selection.sampling,
        )
        tasks.append(TaskQuestions(selection, rows, questions))
    return tasks


def _task_job(
    task_questions: TaskQuestions,
    options: EvalOptions,
    tokenizer: Any,
    longest: int,
    limit: RowLimit | None,
    notes: list[str],
) -> ScoringJob:
    """Return a task as the model with that tokenizer reads it."""
    selection = task_questions.selection
    task, shots, questions = selection.task, selection.num_fewshot, task_questions.questions
    if task.kind == "perplexity":
        return _documents_job(task_questions, options, tokenizer, longest, limit, notes)
    chat = None
    if task.spec.chat:  # rendered as training rows are
        chat = Chat.of(load_template("auto", tokenizer))
    elif options.apply_chat_template:
        chat = Chat.of_model(unwrap(tokenizer), options.fewshot_as_multiturn, notes)
    if options.system is not None:
        if chat is None:
            raise SlimError(
                f"--system is a turn of a chat template, and {task.name} does not use one",
                "add --apply-chat-template, or write the text into the task's description",
            )
        chat = chat.with_system(options.system)
    if chat is not None:
        questions = build_questions(
            task,
            task_questions.rows,
            shots,
            options.limit,
            chat=chat,
            sampling=selection.sampling,
        )
    job = TaskJob(
        task=task,
        checksum=task_questions.rows.checksum,
        num_fewshot=shots,
        limit=options.limit,
        questions=questions,
        encoder=RequestEncoder(
            tokenizer, longest, chat=chat is not None and chat.renders_bos, limit=limit
        ),
        chat=chat is not None,
        shots_checksum=shots_checksum(task, task_questions.rows, shots),
        sampling=selection.sampling,
    )
    job.check_questions()
    return job


def _documents_job(
    task_questions: TaskQuestions,
    options: EvalOptions,
    tokenizer: Any,
    longest: int,
    limit: RowLimit | None,
    notes: list[str],
) -> DocumentsJob:
    selection, rows = task_questions.selection, task_questions.rows
    unused = {
        "--apply-chat-template": options.apply_chat_template,
        "--system": options.system is not None,
        "--num-fewshot": bool(selection.num_fewshot),
    }
    if named := [option for option, is_set in unused.items() if is_set]:
        raise SlimError(
            f"{selection.task.name} predicts a text as it is, without {', '.join(named)}",
            "score it in a run of its own, with its own -o",
        )
    encoder = RequestEncoder(tokenizer, longest, limit=limit)
    job = DocumentsJob(
        selection.task, rows.checksum, options.limit, task_questions.questions, encoder
    )
    notes.append(job.cut_note())
    return job


def _target(
    source: str,
    config: JsonObject,
    tasks: Sequence[TaskQuestions],
    texts: TextDocuments | None,
    options: EvalOptions,
    memory: int,
) -> Target:
    """Return one model's target: its files are present and checked, its weights are not loaded."""
    trust = options.trust_remote_code
    folder = resolve(source, options.revision, trust_remote_code=trust)
    dtype = runtime.resolve_dtype(options.dtype)
    tensors = folder_tensors(folder)
    sizes = {
        name: tensor.nbytes if "quantization" in config else math.prod(tensor.shape) * dtype.size
        for name, tensor in tensors.items()
    }
    fits = sum(sizes.values()) <= memory * runtime.AUTO_FRACTION
    split = chosen_split(options.parallel, config, fits=fits, questions=True)
    needed = sum(sizes.values()) if split is None else rank_bytes(sizes)
    half = not (split or options.adapter) and half_numbers(config, tensors.values(), dtype)
    needed -= 2 * half
    takes = f"{source} takes {human_bytes(needed)} in {runtime.dtype_name(dtype)}"
    _check_memory(needed, takes, "quantize it first, or choose a smaller dtype", memory)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust)
    if options.apply_chat_template and not tokenizer.has_chat_template:
        raise SlimError(f"{source} has no chat template", "leave --apply-chat-template out")
    if options.kv_bits is not None:
        cache_format(build(config), options.kv_bits, source)
    longest = max_length(config, tokenizer)
    if options.max_length is not None and options.max_length > longest:
        raise SlimError(
            f"{source} reads {longest} tokens at most, max_length is {options.max_length}",
            "choose a smaller one",
        )
    longest, limit = options.max_length or longest, row_limit(config)
    notes: list[str] = []
    jobs: list[ScoringJob]
    jobs = [_task_job(one, options, tokenizer, longest, limit, notes) for one in tasks]
    if texts is not None:
        jobs.append(TextJob(texts, RequestEncoder(tokenizer, longest, limit=limit)))
    if any(isinstance(job, TaskJob) and job.generates for job in jobs):
        needed, half = needed + 2 * half, False  # a pass of one token would only cast
    positions = max(job.positions for job in jobs)
    least = planned_footprint(config, dtype.size).least(positions)
    takes += f", the keys and values of {positions:,} tokens {human_bytes(least)}"
    hint = "quantize it first, or choose a smaller --max-length"
    _check_memory(needed + least, takes, hint, memory)
    stack = parse_adapters(options.adapter)
    hashes = [adapter_hash(one.folder) for one in stack]
    state = EvalState(
        schema_version=artifacts.SCHEMA_VERSION,
        code=CODE,
        model=source,
        revision=folder.name if folder.parent.name == "snapshots" else options.revision,
        weights_sha256=model_hash(folder),
        adapter=" + ".join(map(str, stack)) or None,
        adapter_sha256="+".join(hashes) or None,
        dtype=runtime.dtype_name(dtype),
        device="gpu" if runtime.on_gpu() else "cpu",
        seed=options.seed,
        chat_template=options.apply_chat_template,
        fewshot_as_multiturn=options.apply_chat_template and options.fewshot_as_multiturn,
        system_instruction=options.system,
        max_length=longest,
        batch_tokens=options.batch_tokens,
        kv_bits=options.kv_bits,
        **artifacts.provenance(),
        tasks={job.name: job.describe() for job in jobs},
    )
    return Target(
        source=source,
        revision=options.revision,
        adapter=state.adapter,
        stack=stack,
        split=split,
        dtype=dtype,
        half_blocks=bool(half),
        may_widen=fits,
        trust_remote_code=trust,
        batch_tokens=options.batch_tokens,
        notes=notes,
        memory=int(memory * runtime.AUTO_FRACTION),
        jobs=jobs,
        folder=Path(),
        started=False,
        state=state,
        trained_on=_trained_on([folder, *(one.folder for one in stack)], tasks, options),
    )


def _check_memory(needed: int, takes: str, hint: str, memory: int) -> None:
    if needed > memory:
        ranks = runtime.world().size()
        who = "the device has" if ranks == 1 else f"each of {ranks} ranks has"
        raise ResourceError(f"{takes}; {who} {human_bytes(memory)}", hint)


def _trained_on(
    artifacts: Sequence[Path], tasks: Sequence[TaskQuestions], options: EvalOptions
) -> dict[str, TrainedOn]:
    """Return task -> how many of its questions the model was trained on, and in which run."""
    trained = trained_keys(artifacts)
    overlaps: dict[str, TrainedOn] = {}
    for one_task in tasks if trained else []:
        task = one_task.selection.task
        keys = [key for key in question_keys(task, one_task.rows, options.limit) if key in trained]
        if keys:
            runs = sorted({Path(trained[key]).name for key in keys})
            overlaps[task.name] = TrainedOn(len(keys), runs)
    return overlaps


def _check_disk(out: Path, jobs: list[ScoringJob]) -> None:
    """Refuse a disk that cannot hold the samples."""
    needed = _MIN_DISK + sum(_SAMPLE_BYTES * job.chunks[-1].stop for job in jobs)
    if (free := runtime.free_disk(out)) < needed:
        size = human_bytes(needed)
        raise ResourceError(
            f"the disk has {human_bytes(free)} free for {out}, the results need about {size}",
            "free some space, or choose another output folder",
        )
