"""The demo: a real model learns a task that it could not do, and the proof is a table.

Invariant: the held-out rows are scored the same way before and after, with the prompts that
training used; each method's "before" is the base that it tuned (the 4-bit one for QLoRA). Every
step leaves a complete file or folder, and a second run reuses what is complete and says so. Try
it: ``mlx-slim demo``, or ``mlx-slim demo --methods "lora qlora dora full"``.

Folder: ``model/`` (imported), ``model-4bit/``, ``runs/<method>/`` (run folders), ``scores/``
(one JSON and one ``samples_demo.jsonl`` for each scored model), ``results.json``, ``report.md``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import mlx.core as mx

from mlx_slim import artifacts, locks
from mlx_slim.adapters.store import load_adapter
from mlx_slim.claims import held
from mlx_slim.config import library
from mlx_slim.config.load import Resolved, load_recipe
from mlx_slim.config.schema import Method, QuantizeConfig, Recipe
from mlx_slim.data.templates import load_template
from mlx_slim.data.tokenize import unwrap
from mlx_slim.errors import Interrupted, SlimError, did_you_mean
from mlx_slim.evaluation.scoring.generate import generate_batch
from mlx_slim.evaluation.scoring.requests import Encoder, max_length
from mlx_slim.evaluation.tasks.metrics import record_generation, summarize
from mlx_slim.evaluation.tasks.prompts import Chat, Question, build_questions
from mlx_slim.evaluation.tasks.rows import load_rows
from mlx_slim.evaluation.tasks.spec import Task, find_task
from mlx_slim.events import Notice, Observer
from mlx_slim.finetuning.run import finetune
from mlx_slim.finetuning.run_dir import STATE_FILE
from mlx_slim.models.convert import convert
from mlx_slim.models.hub import SMOLLM2_PACKAGE, bundled_smollm2, resolve
from mlx_slim.models.limits import limit_of
from mlx_slim.models.load import Loaded, load, read_config
from mlx_slim.models.quantized import densify
from mlx_slim.models.save import save_model
from mlx_slim.quantization.apply import load_quantized
from mlx_slim.reading import read_object
from mlx_slim.runtime import dtype_name, human_bytes, human_duration, on_gpu, resolve_dtype

TASK = "demo_exact_match"  # as in `mlx-slim eval --task`
METHODS: tuple[str, ...] = get_args(Method)
_FULL_RATE = 2.0e-4  # full tuning moves every weight: a tenth of the adapters' rate


@dataclass(frozen=True)
class Scored:
    """A model's answers to the held-out rows.

    Attributes:
        n: Rows.
        exact: Answers right to the letter.
        same_json: Answers that parse to the right JSON value.
        seconds: Time that generating them took.
    """

    n: int
    exact: int
    same_json: int
    seconds: float


@dataclass(frozen=True)
class DemoRow:
    """One method's line of the table; sizes in bytes, ``minutes`` of training.

    Attributes:
        method: ``full``, ``lora``, ``qlora`` or ``dora``.
        before: Its base.
        after: The tuned model.
        trainable: Trainable parameters.
        total: All parameters.
        tokens_per_second: Real tokens trained on, per second.
        peak_memory_bytes: MLX's peak while training.
        base_bytes: The base model on disk.
        tuned_bytes: What training wrote: adapters, or a whole model.
        minutes: Wall time of the training steps.
    """

    method: str
    before: Scored
    after: Scored
    trainable: int
    total: int
    tokens_per_second: float
    peak_memory_bytes: int
    base_bytes: int
    tuned_bytes: int
    minutes: float


def demo(
    out: Path,
    methods: Sequence[str] = ("qlora",),
    *,
    model: str | None = None,
    limit: int | None = None,
    overrides: Sequence[str] = (),
    watch: Callable[[str], AbstractContextManager[Observer]],
) -> list[DemoRow]:
    """Import, quantize, score, fine-tune, score again; write ``results.json`` and ``report.md``.

    Args:
        out: The demo's folder; what is complete in it is reused.
        methods: Of ``METHODS``, in the order to run.
        model: Hub id or folder; None takes SmolLM2-135M-Instruct from the package index.
        limit: Held-out rows to score; None scores all.
        overrides: Dotted recipe assignments, for all methods.
        watch: Gives the observer of a part, by its title, for a ``with`` block.

    Returns:
        One row a method.

    Raises:
        SlimError: Unknown method, or whatever a step raises.
        Interrupted: Ctrl-C while training; the same command goes on from there.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise SlimError(f"no method {unknown[0]!r}", did_you_mean(unknown[0], METHODS))
    methods = list(dict.fromkeys(methods))
    for method in methods:
        demo_recipe(method, out, overrides)  # a mistyped key is said before any work
    with held(out.absolute()):
        _check_other_files(out)
        locks.remove_dead(out)
        return _run(out, methods, model, limit, overrides, watch)


def _check_other_files(out: Path) -> None:
    """Refuse a folder whose report or results are no demo's."""
    known = artifacts.read_json(out / "results.json") if (out / "results.json").exists() else {}
    ours = isinstance(known, dict) and isinstance(known.get("methods"), dict)
    if not ours and any((out / name).exists() for name in ("results.json", "report.md")):
        raise SlimError(f"{out} holds results of something else", "choose another folder")


def _run(
    out: Path,
    methods: Sequence[str],
    model: str | None,
    limit: int | None,
    overrides: Sequence[str],
    watch: Callable[[str], AbstractContextManager[Observer]],
) -> list[DemoRow]:
    """Do all of it in the folder that this process holds."""
    with watch("demo: the model") as observer:
        dense = _dense(out / "model", model, observer)
        small = dense
        if "qlora" in methods:
            settings = demo_recipe("qlora", dense, overrides).recipe.quantize
            small = _quantized(dense, out / "model-4bit", settings, observer)
    rows: list[DemoRow] = []
    for method in methods:
        base = small if method == "qlora" else dense
        resolved = demo_recipe(method, base, overrides)
        name = "base-4bit" if method == "qlora" else "base"
        with watch(f"demo: {method}") as observer:
            before = _score(resolved.recipe, None, out / "scores" / name, limit, observer)
            run = _train(out / "runs" / method, resolved, observer)
            after = _score(resolved.recipe, run, out / "scores" / method, limit, observer)
        rows.append(_row(method, base, run, before, after))
        _write(out, model, resolved.recipe, rows)
    return rows


def data_files() -> tuple[Path, Path]:
    """Return the bundled training rows and held-out rows."""
    folder = library.folder("evals") / "demo"
    return folder / "train.jsonl", folder / "test.jsonl"


# --------------------------------------------------------------------------------------- models


def _dense(folder: Path, model: str | None, observer: Observer) -> Path:
    """Return the folder of the model that was asked for, importing the default one once."""
    if model is not None:
        return resolve(model)
    if not _reused(folder, observer):
        file = bundled_smollm2()
        convert(file, folder, dtype=mx.float16, dequantize=True)
        observer.notify(Notice(f"imported {file.name} to {folder}"))
    return folder


def _quantized(dense: Path, folder: Path, settings: QuantizeConfig, observer: Observer) -> Path:
    """Return a 4-bit copy of ``dense``, or ``dense`` itself if it is quantized already."""
    if "quantization" in read_config(dense):
        return dense
    if not _reused(folder, observer):
        loaded, report = load_quantized(dense, settings)
        save_model(folder, loaded.model, loaded.tokenizer, loaded.config, code_from=dense)
        sizes = f"{human_bytes(report.bytes_before)} → {human_bytes(report.bytes_after)}"
        observer.notify(Notice(f"quantized: {report.bits_per_weight:.2f} bits a weight, {sizes}"))
    return folder


def _reused(path: Path, observer: Observer) -> bool:
    if not path.exists():
        return False
    observer.notify(Notice(f"{path} is complete: reused"))
    return True


# ------------------------------------------------------------------------------------- training


def demo_recipe(method: str, base: Path, overrides: Sequence[str]) -> Resolved:
    """Return the recipe ``_demo`` for ``method`` over ``base``, with the user's ``overrides``."""
    given = {"model": base, "method": method, "data.path": data_files()[0]}
    if method == "full":
        given["train.learning_rate"] = _FULL_RATE
    return load_recipe("_demo", [*(f"{key}={value}" for key, value in given.items()), *overrides])


def _train(run: Path, resolved: Resolved, observer: Observer) -> Path:
    """Fine-tune into ``run``, going on where a killed run stopped."""
    started = (run / STATE_FILE).exists()
    try:
        finetune(resolved, run, observer=observer, resume=started)
    except Interrupted as stop:
        raise Interrupted(stop.message, "the same command goes on from there") from stop
    return run


# -------------------------------------------------------------------------------------- scoring


def _score(
    recipe: Recipe, run: Path | None, folder: Path, limit: int | None, observer: Observer
) -> Scored:
    """Return the score of the recipe's model, tuned by ``run`` if given; reuse ``folder``."""
    tuned = [] if run is None else sorted(run.glob("adapters/*")) + sorted(run.glob("model/*"))
    key = artifacts.hash_json(
        {
            "rows": artifacts.hash_file(data_files()[1]),
            "limit": limit,
            "data": recipe.data.model_dump(mode="json"),
            "model": recipe.model,
            "tuned": [artifacts.hash_file(path) for path in tuned],
        }
    )
    file = folder / "score.json"
    if file.exists() and (known := read_object(file)).get("key") == key:
        observer.notify(Notice(f"{folder} is complete: reused"))
        return Scored(**known["score"])
    whole = run is not None and (run / "model").is_dir()
    loaded = load(run / "model" if run and whole else recipe.model, dtype=resolve_dtype("auto"))
    if run and not whole:
        load_adapter(loaded.model, run / "adapters")
    if not on_gpu():
        densify(loaded.model)
    task, asked, prompts = questions(recipe, loaded, limit)
    answers = [str(question.target) for question in asked]
    encode = loaded.tokenizer.encode
    longest = max(len(encode(answer, add_special_tokens=False)) for answer in answers)
    began = time.monotonic()
    generated = generate_batch(
        loaded.model,
        loaded.tokenizer,
        prompts,
        max_tokens=longest + 2,  # with what closes it; no longer answer can be right
    )
    seconds = time.monotonic() - began
    records = [
        record_generation(task, question, answer.text, answer.stop_reason)
        for question, answer in zip(asked, generated, strict=True)
    ]
    metrics = summarize(task, records)["metrics"]
    exact, same_json = metrics["exact_match"]["k"], metrics["json_match"]["k"]
    scored = Scored(len(records), exact, same_json, round(seconds, 2))
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    artifacts.write_text(folder / "samples_demo.jsonl", "".join(lines))
    artifacts.write_json(file, {"key": key, "score": asdict(scored)})
    what = "the tuned model" if run else "the base"
    observer.notify(
        Notice(
            f"{what} answers {scored.exact} of {scored.n} held-out rows right "
            f"({human_duration(seconds)})"
        )
    )
    return scored


def questions(
    recipe: Recipe, loaded: Loaded, limit: int | None = None
) -> tuple[Task, list[Question], list[list[int]]]:
    """Return the demo's task, its held-out questions, and their prompts as training reads them."""
    task = find_task(TASK)
    system = {"description": recipe.data.system or ""}
    task = replace(task, spec=task.spec.model_copy(update=system))
    chat = Chat.of(load_template(recipe.data.template, unwrap(loaded.tokenizer)))
    asked = build_questions(task, load_rows(task), limit=limit, chat=chat)
    longest = max_length(loaded.config, loaded.tokenizer)
    encoder = Encoder(loaded.tokenizer, longest, chat=chat.own_bos, limit=limit_of(loaded.config))
    return task, asked, [encoder.prompt(question.context, 1) for question in asked]


# ------------------------------------------------------------------------------------ reporting


def _row(method: str, base: Path, run: Path, before: Scored, after: Scored) -> DemoRow:
    record = read_object(run / "run.json")
    result = record["result"]
    done = result["done"]
    return DemoRow(
        method=method,
        before=before,
        after=after,
        trainable=result["trainable"],
        total=result["total"],
        tokens_per_second=done["tokens"] / done["seconds"],
        peak_memory_bytes=done["peak_memory_bytes"],
        base_bytes=sum(path.stat().st_size for path in base.glob("*.safetensors")),
        tuned_bytes=record["artifact_bytes"],
        minutes=done["seconds"] / 60,
    )


HEADINGS = (
    "method",
    "exact match before",
    "after",
    "trainable parameters",
    "tokens/s",
    "peak memory",
    "base on disk",
    "tuning on disk",
    "training",
)


def cells(row: DemoRow) -> tuple[str, ...]:
    """Return a row of the closing table, one text for each of ``HEADINGS``."""
    return (
        row.method,
        f"{row.before.exact}/{row.before.n} ({row.before.exact / row.before.n:.0%})",
        f"{row.after.exact}/{row.after.n} ({row.after.exact / row.after.n:.0%})",
        f"{row.trainable:,} ({row.trainable / row.total:.2%})",
        f"{row.tokens_per_second:,.0f}",
        human_bytes(row.peak_memory_bytes),
        human_bytes(row.base_bytes),
        human_bytes(row.tuned_bytes),
        human_duration(60 * row.minutes),
    )


def _write(out: Path, model: str | None, recipe: Recipe, rows: list[DemoRow]) -> None:
    """Write ``results.json`` and ``report.md``."""
    source = model or SMOLLM2_PACKAGE
    artifacts.write_json(
        out / "results.json",
        {
            "schema_version": artifacts.SCHEMA_VERSION,
            "model": source,
            "dtype": dtype_name(resolve_dtype(recipe.train.dtype)),
            "seed": recipe.train.seed,
            **artifacts.provenance(),
            "methods": {row.method: asdict(row) for row in rows},
        },
    )
    lines = [
        "# Demo",
        "",
        f"Model: {source}. Task: a messy expense message becomes one line of JSON; "
        f"{rows[0].after.n} held-out rows, exact match of the whole line.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|{'---|' * len(HEADINGS)}",
        *(f"| {' | '.join(cells(row))} |" for row in rows),
    ]
    artifacts.write_text(out / "report.md", "\n".join(lines) + "\n")
