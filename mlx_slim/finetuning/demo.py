"""The demo: a real model is fine-tuned for a task that it cannot do, and scored before and after.

Invariant: the rows that are scored are not trained on, and their prompts are those of training;
each method's "before" is the base that it tuned (the 4-bit one for QLoRA). Every step leaves a
complete file or folder; a second run reuses what is complete and reports that. Try it:
``mlx-slim demo``, or ``mlx-slim demo --methods "lora qlora dora full"``.

Folder: ``model/`` (imported), ``model-4bit/``, ``runs/<method>/`` (run folders), ``scores/``
(for each scored model the folder of ``mlx-slim eval``, and its key), ``results.json``,
``report.md``.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import mlx.core as mx

from mlx_slim import artifacts, locks
from mlx_slim.claims import held
from mlx_slim.config import library
from mlx_slim.config.load import Resolved, load_recipe
from mlx_slim.config.schema import DataConfig, QuantizeConfig, Recipe
from mlx_slim.config.values import Method
from mlx_slim.errors import Interrupted, SlimError, did_you_mean
from mlx_slim.evaluation.options import EvalOptions
from mlx_slim.evaluation.results import TIMINGS_FILE, samples_name
from mlx_slim.evaluation.run import evaluate
from mlx_slim.evaluation.tasks.spec import find_task
from mlx_slim.events import Notice, Observer
from mlx_slim.finetuning.demo_page import TASK, write_answered_page
from mlx_slim.finetuning.options import DemoOptions
from mlx_slim.finetuning.run import finetune
from mlx_slim.finetuning.run_dir import STATE_FILE, read_result
from mlx_slim.models.convert import convert
from mlx_slim.models.hub import SMOLLM2_PACKAGE, bundled_smollm2, resolve
from mlx_slim.models.load import read_config
from mlx_slim.models.save import save_model
from mlx_slim.quantization.apply import load_quantized
from mlx_slim.reading import read_object
from mlx_slim.runtime import dtype_name, resolve_dtype
from mlx_slim.units import human_bytes, human_duration

METHODS: tuple[str, ...] = get_args(Method)
_FULL_RATE = 2.0e-4  # full fine-tuning changes every weight: a tenth of the adapters' rate


@dataclass(frozen=True)
class Scored:
    """A model's answers to the validation rows.

    Attributes:
        n: Rows.
        exact: Answers that are equal to the expected text.
        same_json: Answers that parse to the expected JSON value.
        seconds: Time of generating them.
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
        tuned_bytes: Size of the adapters, or of the whole model.
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
    methods: Sequence[str] = (DemoOptions.methods,),
    *,
    model: str | None = DemoOptions.model,
    limit: int | None = DemoOptions.limit,
    overrides: Sequence[str] = (),
    watch: Callable[[str], AbstractContextManager[Observer]],
) -> list[DemoRow]:
    """Import, quantize, score, fine-tune, score again; write ``results.json`` and ``report.md``.

    Args:
        out: The demo's folder; complete results in it are reused.
        methods: Of ``METHODS``, in the order to run.
        model: Hub id or folder; None takes SmolLM2-135M-Instruct from the package index.
        limit: Validation rows to score; None scores all.
        overrides: Dotted recipe assignments, for all methods.
        watch: Returns the observer of a step by its title, for a ``with`` block.

    Returns:
        One row a method.

    Raises:
        SlimError: Unknown method or key, other prompts than the task's, or an error of a step.
        Interrupted: Ctrl-C while training; the same command resumes.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise SlimError(f"no method {unknown[0]!r}", did_you_mean(unknown[0], METHODS))
    methods = list(dict.fromkeys(methods))
    for method in methods:
        _check_prompts(demo_recipe(method, out, overrides).recipe.data)  # before any work
    with held(out.absolute()):
        _check_other_files(out)
        locks.remove_dead(out)
        return _run(out, methods, model, limit, overrides, watch)


def _check_other_files(out: Path) -> None:
    """Check that the report and the results in the folder are those of a demo."""
    file = out / "results.json"
    results = artifacts.read_json(file) if file.exists() else {}
    ours = isinstance(results, dict) and isinstance(results.get("methods"), dict)
    if not ours and any((out / name).exists() for name in ("results.json", "report.md")):
        raise SlimError(f"{out} has results of another command", "choose another folder")


def _run(
    out: Path,
    methods: Sequence[str],
    model: str | None,
    limit: int | None,
    overrides: Sequence[str],
    watch: Callable[[str], AbstractContextManager[Observer]],
) -> list[DemoRow]:
    """Run all steps in the folder, which this process has locked."""
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
            scores = (out / "scores" / one / samples_name(TASK) for one in (name, method))
            write_answered_page(run, data_files()[1], *scores)
        rows.append(_row(method, base, run, before, after))
        _write(out, model, resolved.recipe, rows)
    return rows


def data_files() -> tuple[Path, Path]:
    """Return the bundled training rows and validation rows."""
    folder = library.folder("evals") / "demo"
    return folder / "train.jsonl", folder / "test.jsonl"


# --------------------------------------------------------------------------------------- models


def _dense(folder: Path, model: str | None, observer: Observer) -> Path:
    """Return the folder of ``model``; the default one is imported once."""
    if model is not None:
        return resolve(model)
    if not _reused(folder, observer):
        file = bundled_smollm2()
        convert(file, folder, dtype=mx.float16, dequantize=True)
        observer.notify(Notice(f"imported {file.name} to {folder}"))
    return folder


def _quantized(dense: Path, folder: Path, settings: QuantizeConfig, observer: Observer) -> Path:
    """Return a quantized copy of ``dense``, or ``dense`` itself if it is quantized already."""
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
    values = {"model": base, "method": method, "data.path": data_files()[0]}
    if method == "full":
        values["train.learning_rate"] = _FULL_RATE
    return load_recipe("_demo", [*(f"{key}={value}" for key, value in values.items()), *overrides])


def _train(run: Path, resolved: Resolved, observer: Observer) -> Path:
    """Fine-tune into ``run``; an interrupted run is resumed."""
    with _same_command():
        finetune(resolved, run, observer=observer, resume=(run / STATE_FILE).exists())
    return run


@contextlib.contextmanager
def _same_command() -> Iterator[None]:
    """Let the hint of an interrupted step name the demo."""
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(stop.message, "the same command resumes") from stop


# -------------------------------------------------------------------------------------- scoring


def _check_prompts(data: DataConfig) -> None:
    """Check that training uses the prompts of the task.

    Raises:
        SlimError: Names the key that changes them.
    """
    description = find_task(TASK).spec.description
    for key, value, expected in (
        ("system", data.system, description),
        ("template", data.template, "auto"),
    ):
        if value != expected:
            raise SlimError(
                f"data.{key} is {value!r}, and the demo scores with {expected!r}",
                "train with other prompts by mlx-slim train, and score by mlx-slim eval",
            )


def _score(
    recipe: Recipe, run: Path | None, folder: Path, limit: int | None, observer: Observer
) -> Scored:
    """Return the score of the recipe's model, tuned by ``run`` if set; a complete one is reused."""
    model, adapter = resolve(recipe.model, recipe.revision), None
    if run is not None and (run / "model").is_dir():
        model = run / "model"
    elif run is not None:
        adapter = run / "adapters"
    files = [*sorted(model.glob("*")), *(sorted(adapter.glob("*")) if adapter else [])]
    key = artifacts.hash_json(
        {
            "limit": limit,
            "files": [artifacts.hash_file(path) for path in files if path.is_file()],
            "provenance": artifacts.provenance(),
        }
    )
    file = folder.with_name(f"{folder.name}.json")
    stored = read_object(file) if file.exists() else {}
    if stored.get("key") != key:
        shutil.rmtree(folder, ignore_errors=True)
        artifacts.write_json(file, {"key": key})
    elif "score" in stored:
        observer.notify(Notice(f"{folder} is complete: reused"))
        return Scored(**stored["score"])
    options = EvalOptions(adapter=adapter, limit=limit)
    with _same_command():
        (results,) = evaluate(
            model, TASK, folder, options, resume=folder.exists(), observer=observer
        )
    section = results["tasks"][TASK]
    exact, same_json = (section["metrics"][name]["k"] for name in ("exact_match", "json_match"))
    seconds = read_object(folder / TIMINGS_FILE)["tasks"][TASK]["seconds"]
    scored = Scored(section["n"], exact, same_json, round(seconds, 2))
    artifacts.write_json(file, {"key": key, "score": asdict(scored)})
    name = "the base" if run is None else "the tuned model"
    observer.notify(
        Notice(
            f"{name} answers {exact} of {scored.n} validation rows correctly "
            f"({human_duration(seconds)})"
        )
    )
    return scored


# ------------------------------------------------------------------------------------ reporting


def _row(method: str, base: Path, run: Path, before: Scored, after: Scored) -> DemoRow:
    result = read_result(run)
    done = result.done
    return DemoRow(
        method=method,
        before=before,
        after=after,
        trainable=result.trainable,
        total=result.total,
        tokens_per_second=done.tokens / done.seconds,
        peak_memory_bytes=done.peak_memory_bytes,
        base_bytes=sum(path.stat().st_size for path in base.glob("*.safetensors")),
        tuned_bytes=read_object(run / "run.json", artifact_bytes=int)["artifact_bytes"],
        minutes=done.seconds / 60,
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
        f"{rows[0].after.n} validation rows, exact match of the whole line.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|{'---|' * len(HEADINGS)}",
        *(f"| {' | '.join(cells(row))} |" for row in rows),
    ]
    artifacts.write_text(out / "report.md", "\n".join(lines) + "\n")
