"""Make, score and record one cell of a matrix.

Invariant: the manifest ``cell.json`` is written last; what is complete under the same key is
reused, what has another key is computed again, and a killed training or evaluation resumes where
it stopped. A cell reads nothing of another one but a parent's adapters or model.
Try it: ``mlx-slim compare matrix-tiny -o DIR --only smollm2-base``.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from mlx_slim import artifacts
from mlx_slim.analyze.intruders import find_intruders
from mlx_slim.artifacts import SCHEMA_VERSION, write_json
from mlx_slim.cluster.machines import machine
from mlx_slim.compare import identity
from mlx_slim.compare.jobs import MatrixRun, adapters, whole
from mlx_slim.compare.matrix import Cell
from mlx_slim.compare.measured import measured
from mlx_slim.compare.predict import predicted_run
from mlx_slim.compare.questions import task_name
from mlx_slim.compare.records import FORGETTING, CellRecord, DiskUse, IntruderCounts, as_json
from mlx_slim.compare.store import MANIFEST
from mlx_slim.config.load import Resolved
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.records import TEXT, EvalResults
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.export.fuse import FuseOptions, fuse
from mlx_slim.pruning.run import prune
from mlx_slim.reading import read_object
from mlx_slim.sweeping.trial import free

KEYS_FILE = "keys.json"


class CellRun:
    """The steps that make one cell.

    Args:
        job: What the cells of the matrix share.
        cell: Which one.
    """

    def __init__(self, job: MatrixRun, cell: Cell) -> None:
        self.job, self.cell = job, cell
        self.folder = job.out / "cells" / cell.name
        self.base = job.base(cell)

    def run(self) -> None:
        """Make, score and record the cell; results under the same keys are reused.

        Raises:
            SlimError: Whatever a step raises; the cell has no manifest then.
        """
        mark = self.folder / MANIFEST
        if mark.exists():
            manifest = read_object(mark)
            if (
                manifest.get("schema_version") == SCHEMA_VERSION
                and manifest.get("keys") == self.keys
            ):
                self.job.say(f"{self.cell.name} is complete: reused")
                return
            mark.unlink()
        self._build()
        model, adapter = self._answers()
        scored = self._score(model, adapter)
        record = as_json(self._record(model, adapter, scored))
        write_json(mark, {"schema_version": SCHEMA_VERSION, "name": self.cell.name, **record})

    # ------------------------------------------------------------------------------ identity

    @cached_property
    def resolved(self) -> Resolved:
        """The recipe with the chosen learning rate."""
        job, cell = self.job, self.cell
        rate = {"train": {"learning_rate": job.sweep(cell)}} if len(cell.rates) > 1 else {}
        return job.resolved(cell, cell.name, rate)

    @cached_property
    def model_key(self) -> str:
        """What the answering model depends on: a key of training, or a hash of weights."""
        job, cell = self.job, self.cell
        if cell.kind == "tuned":
            return job.train_key(cell, self.resolved)
        if cell.kind == "fused":
            parent = job.out / "cells" / str(cell.parent) / MANIFEST
            if not parent.exists():
                raise SlimError(f"{cell.name} is made from {cell.parent}, which is missing")
            return artifacts.hash_json([read_object(parent)["keys"]["made_of"], "fused"])
        if cell.kind == "pruned":
            return identity.prune_key(job.weights(self.base), job.pruning(cell))
        return job.weights(self.base)

    @cached_property
    def keys(self) -> dict[str, str]:
        """The keys of the manifest: the model's inputs, and each evaluation's."""
        requests = self.job.requests.items()
        scored = {
            f"eval {name}": identity.score_key(self.model_key, what) for name, what in requests
        }
        return {"made_of": self.model_key, **scored}

    # ------------------------------------------------------------------------------ making

    def _build(self) -> None:
        """Train, fuse or prune, unless that is done."""
        outputs = [self.folder / name for name in ("run", "model", "eval")]
        key = {"made_of": self.model_key}
        self.job.match(self.folder, key, KEYS_FILE, outputs)
        if self.cell.kind == "tuned":
            self.job.train(self.resolved, self.folder / "run")
            shutil.rmtree(self.folder / "run" / "checkpoints", ignore_errors=True)
        elif self.cell.kind == "fused" and not (self.folder / "model").exists():
            parent = self.job.out / "cells" / str(self.cell.parent)
            base = read_object(parent / "run" / "run.json")["recipe"]["model"]
            fuse(
                base,
                adapters(parent),
                self.folder / "model",
                FuseOptions(),
                observer=self.job.observer,
            )
            free()
        elif self.cell.kind == "pruned" and not (self.folder / "model").exists():
            options = self.job.pruning(self.cell)
            prune(self.base, self.folder / "model", options, self.job.observer)
            free()

    def _answers(self) -> tuple[Path, Path | None]:
        """Return the model folder and the adapter folder that answer for this cell."""
        if (model := whole(self.folder)) is not None:
            return model, None
        return self.base, adapters(self.folder) if self.cell.kind == "tuned" else None

    # ------------------------------------------------------------------------------ scoring

    def _score(self, model: Path, adapter: Path | None) -> dict[str, EvalResults]:
        """Score every task into a folder of its own; return the results by task."""
        results = {}
        for entry in self.job.layout.matrix.tasks:
            options = EvalOptions(adapter=adapter, limit=entry.limit, num_fewshot=entry.num_fewshot)
            results[task_name(entry.task)] = self._evaluated(entry.task, model, options)
        text = self.job.out / "questions" / f"{FORGETTING}.jsonl"
        if self.job.layout.matrix.forgetting is not None:
            options = EvalOptions(adapter=adapter, perplexity=text)
            results[FORGETTING] = self._evaluated(FORGETTING, model, options)
        return results

    def _evaluated(self, task: str, model: Path, options: EvalOptions) -> EvalResults:
        name = FORGETTING if task == FORGETTING else task_name(task)
        out = self.folder / "eval" / name
        self.job.match(self.folder, {"key": self.keys[f"eval {name}"]}, f"eval-{name}.json", [out])
        tasks = [] if task == FORGETTING else [task]
        started = (out / "eval.json").exists()
        observer = self.job.observer
        (values,) = evaluate(str(model), tasks, out, options, resume=started, observer=observer)
        free()
        results = EvalResults.read(values, str(out))
        section = results.sections[TEXT if task == FORGETTING else name].compared()
        if any(section.get(key) != value for key, value in self.job.requests[name].items()):
            shutil.rmtree(out)
            raise SlimError(
                f"{name}: its rows or its definition changed while the matrix was running",
                "run the same command with --resume: it scores the affected cells again",
            )
        return results

    # ------------------------------------------------------------------------------ the record

    def _record(
        self, model: Path, adapter: Path | None, scored: dict[str, EvalResults]
    ) -> CellRecord:
        cell = self.cell
        recipe = self.resolved.recipe if cell.kind == "tuned" else cell.recipe.recipe
        entry = self.job.layout.matrix.models[cell.model]
        # As in the matrix file: no folder of this machine.
        source = {
            "model": entry.source,
            "revision": entry.revision,
            "distill": cell.recipe.recipe.distill,
        }
        costs = measured(self.folder)
        if costs.train is not None and (prediction := predicted_run(recipe)) is not None:
            seconds = prediction.predicted_seconds
            costs = replace(costs, train=replace(costs.train, predicted_seconds=seconds))
        return CellRecord(
            schema_version=SCHEMA_VERSION,
            name=cell.name,
            model=cell.model,
            method=cell.method,
            kind=cell.kind,
            seed=cell.seed,
            parent=cell.parent,
            keys=self.keys,
            recipe=recipe.model_copy(update=source).model_dump(mode="json"),
            dtype=str(next(iter(scored.values())).settings.dtype),
            tasks=[name for name in scored if name != FORGETTING],
            disk=DiskUse(_size(model), _size(adapter) if adapter else 0),
            **vars(costs),
            intruders=self._intruders() if cell.kind == "tuned" else None,
            weights_sha256=self.job.weights(self.job.dense(cell.model)),
            code=identity.code_version(),
            provenance=machine(),
        )

    def _intruders(self) -> IntruderCounts | None:
        """Count intruder dimensions; the base's spectra are computed once for all cells."""
        if not self.job.layout.matrix.intruders:
            return None
        model, adapter = self._answers()
        self.job.say("counting intruder dimensions")
        intruders = find_intruders(
            str(self.base),
            adapter=adapter,
            tuned=str(model) if adapter is None else None,
            cache=self.job.out / "models" / "spectra",
        )
        total = intruders.overall()
        return IntruderCounts(
            count=int(total["intruders"]),
            directions=intruders.k * int(total["matrices"]),
            matrices=int(total["matrices"]),
            matrices_with=int(total["matrices_with_intruders"]),
            energy=total["energy"],
            relative_norm=total["delta_norm"],
            effective_rank=total["effective_rank"],
            k=intruders.k,
            epsilon=intruders.epsilon,
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
