"""What the cells of one matrix share: imported and rounded models, and chosen learning rates.

Invariant: each is computed once and reused under the same key; under another key it is computed
again; a killed training resumes where it stopped.
Try it: ``mlx-slim compare matrix-tiny -o DIR --only smollm2-base``.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from mlx_slim import artifacts, locks
from mlx_slim.artifacts import SCHEMA_VERSION, read_json, write_json
from mlx_slim.compare import identity
from mlx_slim.compare.matrix import Cell, MatrixPlan, cell_recipe, prune_options
from mlx_slim.compare.records import MatrixRecord, SweepRecord, TriedRate, read_record
from mlx_slim.compare.store import MANIFEST, MATRIX_FILE
from mlx_slim.config.load import Resolved
from mlx_slim.distillation.mutual import FIRST
from mlx_slim.errors import DivergedError, SlimError
from mlx_slim.events import Notice, Observer
from mlx_slim.finetuning.contents import contents
from mlx_slim.models.convert import convert
from mlx_slim.models.hub import SMOLLM2_PACKAGE, bundled_smollm2, resolve
from mlx_slim.models.load import model_files, model_hash, read_config
from mlx_slim.models.save import save_model
from mlx_slim.pruning.options import PruneOptions
from mlx_slim.quantization.apply import load_quantized
from mlx_slim.reading import JsonObject, read_object
from mlx_slim.sweeping.folder import STUDY_FILE
from mlx_slim.sweeping.launch import InProcess
from mlx_slim.sweeping.options import SweepOptions
from mlx_slim.sweeping.records import TrialOutcome
from mlx_slim.sweeping.space import Parameter
from mlx_slim.sweeping.trial import completed, train

RATE = "train.learning_rate"


@dataclass
class MatrixRun:
    """What the jobs of one matrix share.

    Attributes:
        layout: The matrix.
        out: Its folder.
        observer: Notified of every event.
    """

    layout: MatrixPlan
    out: Path
    observer: Observer

    @cached_property
    def requests(self) -> dict[str, JsonObject]:
        """The request of each evaluation, by content, as it was when the folder was prepared.

        Raises:
            SlimError: If it was prepared by a version that did not record it.
        """
        requests = read_record(self.out / MATRIX_FILE, MatrixRecord).requests
        if requests is None:
            raise SlimError(
                f"{self.out} was prepared by another version of mlx-slim",
                "run the whole matrix again with --resume",
            )
        return requests

    def say(self, text: str) -> None:
        """Notify of one line."""
        self.observer.notify(Notice(text))

    # ------------------------------------------------------------------------------ models

    def dense(self, model: str) -> Path:
        """Return the folder of a model, imported once if it is a GGUF file.

        Raises:
            SlimError: If there is no such model.
        """
        entry = self.layout.matrix.models[model]
        packed = entry.source == SMOLLM2_PACKAGE
        if not packed and not entry.source.endswith(".gguf"):
            return resolve(entry.source, entry.revision)
        folder = self.out / "models" / model
        with locks.in_turn(folder):
            if not folder.exists():
                file = bundled_smollm2() if packed else Path(entry.source)
                self.say(f"importing {file.name}")
                convert(file, folder, dtype=mx.float16, dequantize=True)
        return folder

    def start(self, cell: Cell) -> Path:
        """Return the folder of the model that a cell is made from: its parent's, or the matrix's.

        Raises:
            SlimError: If there is no such model.
        """
        if cell.parent is None or cell.kind == "fused":
            return self.dense(cell.model)
        parent = self.out / "cells" / cell.parent
        model = whole(parent) if (parent / MANIFEST).exists() else None
        if model is not None:
            return model
        raise SlimError(f"{cell.name} starts from {cell.parent}, which is missing")

    def quantized(self, cell: Cell) -> Path:
        """Return the folder of the model that ``cell`` starts from, rounded, made once."""
        dense = self.start(cell)
        if "quantization" in read_config(dense):
            return dense
        settings = cell.recipe.recipe.quantize
        name = rounded_name(
            cell.parent or cell.model, settings.bits, settings.group_size, settings.mode
        )
        folder, key = self.out / "models" / name, self.weights(dense)
        mark = folder / "source.json"
        with locks.in_turn(folder):
            if mark.exists() and read_object(mark).get("weights_sha256") == key:
                return folder
            shutil.rmtree(folder, ignore_errors=True)
            loaded, report = load_quantized(dense, settings)
            self.say(f"quantized to {report.bits_per_weight:.2f} bits a weight")
            save_model(folder, loaded.model, loaded.tokenizer, loaded.config, code_from=dense)
            write_json(mark, {"weights_sha256": key})
        return folder

    def weights(self, folder: Path) -> str:
        """Return ``model_hash``, computed once for files as they are (``models/hashes.json``)."""
        files = {
            path.name: [path.stat().st_size, path.stat().st_mtime_ns]
            for path in model_files(folder)
        }
        cache = self.out / "models" / "hashes.json"
        hashes = read_object(cache) if cache.exists() else {}
        name = self._called(folder)
        if hashes.get(name, {}).get("files") != files:
            hashes[name] = {"sha256": model_hash(folder), "files": files}
            write_json(cache, hashes)
        return hashes[name]["sha256"]

    def _called(self, folder: Path) -> str:
        """Return a model folder's name in ``hashes.json``: no path of this machine."""
        whole, out = folder.resolve(), self.out.resolve()
        if whole.is_relative_to(out):
            return whole.relative_to(out).as_posix()
        return f"{whole.name} {artifacts.hash_bytes(str(whole).encode())[:12]}"

    def base(self, cell: Cell) -> Path:
        """Return what a cell starts from: the rounded model for QLoRA, else the dense one."""
        qlora = cell.kind == "tuned" and cell.recipe.recipe.method == "qlora"
        return self.quantized(cell) if cell.kind == "quantized" or qlora else self.start(cell)

    def pruning(self, cell: Cell) -> PruneOptions:
        """Return the options of a pruned cell."""
        return prune_options(self.layout.matrix, cell.method)

    # ------------------------------------------------------------------------------ the sweep

    def sweep(self, cell: Cell) -> float:
        """Return the learning rate with the lowest validation loss, tried or read.

        Raises:
            SlimError: If nothing can be compared: no validation rows, or every rate diverged.
        """
        matrix = self.layout.matrix
        folder = self.out / "sweeps" / f"{cell.model}-{cell.method}"
        runs: dict[str, tuple[float, Resolved, str]] = {}  # by the name of the run's folder
        for rate in cell.rates:
            changes: JsonObject = {"learning_rate": rate, "seed": matrix.sweep.seed}
            if matrix.sweep.steps is not None:
                changes["steps"] = matrix.sweep.steps
            name = f"{cell.model}-{cell.method}-{rate:g}"
            resolved = self.resolved(cell, name, {"train": changes})
            runs[f"{rate:g}"] = rate, resolved, self.train_key(cell, resolved)
        keys = {name: key for name, (_, _, key) in runs.items()}
        mark = folder / "sweep.json"
        if mark.exists() and (stored := read_object(mark)).get("keys") == keys:
            return stored["chosen"]
        outcomes = self._search(folder, runs, keys)
        tried = [TriedRate(runs[name][0], outcomes[name].loss) for name in runs]
        finite = {
            r.learning_rate: r.validation_loss for r in tried if r.validation_loss is not None
        }
        if not finite:
            raise SlimError(
                f"{cell.model} {cell.method}: no learning rate of the sweep gave a validation loss",
                "set recipe.data.validation, or try lower learning_rates",
            )
        best = min(finite, key=finite.__getitem__)
        recipe = next(iter(runs.values()))[1].recipe
        record = SweepRecord(
            schema_version=SCHEMA_VERSION,
            model=cell.model,
            method=cell.method,
            steps=matrix.sweep.steps or recipe.train.steps or f"{recipe.train.epochs:g} epochs",
            seed=matrix.sweep.seed,
            rates=tried,
            chosen=best,
            keys=keys,
        )
        write_json(mark, asdict(record))
        return best

    def _search(
        self, folder: Path, runs: dict[str, tuple[float, Resolved, str]], keys: dict[str, str]
    ) -> dict[str, TrialOutcome]:
        """Try each rate once, as ``mlx-slim sweep`` tries what is queued; return name -> outcome.

        Args:
            folder: Of the sweep.
            runs: Name -> rate, recipe and key.
            keys: Of all runs: the study of other ones is made anew.
        """
        from mlx_slim.sweeping.search import search  # Optuna takes a second
        from mlx_slim.sweeping.study import StudyPlan, SweepStudy

        options = SweepOptions(trials=len(runs), pruner="none")
        rates = tuple(rate for rate, _, _ in runs.values())
        queue = tuple({RATE: rate} for rate in rates)
        self.match(folder, keys, "study.keys.json", [folder / STUDY_FILE])
        if not (folder / STUDY_FILE).exists():
            SweepStudy.create(folder / STUDY_FILE, options)
        plan = StudyPlan((Parameter(RATE, choices=rates),), options, queue)
        study = SweepStudy(folder / STUDY_FILE, plan)
        names = list(runs)

        def tried(name: str) -> TrialOutcome:
            rate, resolved, key = runs[name]
            self.say(f"learning rate {rate:g}")
            return self._tried(folder / name, resolved, key)

        search(
            study,
            len(runs),
            InProcess(tried),
            lambda proposal: (names[proposal.number], 0),
            lambda number, outcome: None,
        )
        return {names[row.number]: row.outcome for row in study.rows()}

    def _tried(self, run: Path, resolved: Resolved, key: str) -> TrialOutcome:
        """Return how a short run ended; its weights stay."""
        self.match(run.parent, {run.name: key}, f"{run.name}.keys.json", [run])
        try:
            self.train(resolved, run)
        except DivergedError as error:
            self.say(f"diverged: {error.message}")
            return TrialOutcome("diverged", why=error.message)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        return completed(run)

    # ------------------------------------------------------------------------------ steps

    def resolved(self, cell: Cell, name: str, changes: JsonObject) -> Resolved:
        """Return a recipe that runs here: over a folder, with ``changes``.

        Teachers that are not named are the unchanged model of the matrix; their targets are
        cached once for all cells.
        """
        values = {"model": str(self.base(cell)), "revision": None, **changes}
        if (distill := cell.recipe.recipe.distill) is not None:
            itself = {"model": str(self.dense(cell.model)), "revision": None}
            teachers = [
                {**teacher.model_dump(), **(itself if teacher.model is None else {})}
                for teacher in distill.teachers
            ]
            cache = distill.cache or str(self.out / "models" / "targets")
            values["distill"] = {"teachers": teachers, "cache": cache}
        return cell_recipe(self.layout.matrix, cell.model, cell.method, cell.seed, name, values)

    def train_key(self, cell: Cell, resolved: Resolved) -> str:
        """Return the identity of a training of ``cell`` as ``resolved`` says."""
        recipe = resolved.recipe
        teachers = [
            self.weights(Path(teacher.model))
            for teacher in (recipe.distill.teachers if recipe.distill else [])
            if teacher.model is not None and Path(teacher.model).is_dir()
        ]
        named = contents(recipe)
        return identity.train_key(recipe, [self.weights(self.base(cell)), *teachers], named)

    def match(self, folder: Path, keys: dict[str, str], file: str, stale: list[Path]) -> None:
        """Remove results of other keys, and record the current keys."""
        mark = folder / file
        if mark.exists() and read_json(mark) == keys:
            return
        for path in stale:
            if path.exists():
                self.say(f"{path.relative_to(self.out)}: its inputs changed, computed again")
                path.unlink() if path.is_file() else shutil.rmtree(path)
        write_json(mark, keys)

    def train(self, resolved: Resolved, run: Path) -> None:
        """Fine-tune, resuming where a killed run stopped."""
        train(resolved, run, self.observer)


def whole(folder: Path) -> Path | None:
    """Return the model that the cell in ``folder`` made; None if it made adapters, or nothing.

    In mutual distillation the first student is the cell's model.
    """
    candidates = (folder / "model", folder / "run" / "model", folder / "run" / FIRST)
    return next((model for model in candidates if (model / "config.json").is_file()), None)


def adapters(folder: Path) -> Path:
    """Return the adapters that the cell in ``folder`` trained: of two students the first's."""
    first = folder / "run" / FIRST
    return first if first.is_dir() else folder / "run" / "adapters"


def rounded_name(source: str, bits: int, group_size: int, mode: str) -> str:
    """Return the folder's name in ``models/`` of a rounded model.

    Args:
        source: What is rounded: a model of the matrix, or a cell.
        bits: Of a weight.
        group_size: Weights that share a scale.
        mode: ``affine`` or a floating-point format.
    """
    return f"{source}-{bits}bit-g{group_size}-{mode}"
