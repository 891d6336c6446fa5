"""The recovery of a candidate: its recipe, chosen before anything is cut, and the distillation.

Invariant: ``recover.yaml`` is chosen from shapes and rows alone, by the process that searches, so
that it is the same wherever the recovery runs; where targets of the teacher lie is not in it, and
targets are shared only between recoveries whose batches are of one size. Used by
``slimming/build.py`` and ``slimming/search.py``. Try it: ``mlx-slim distill
DIR/candidates/KEY/recover.yaml -o AGAIN``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_slim.artifacts import write_json, write_text
from mlx_slim.config.load import Resolved, load_recipe
from mlx_slim.config.recipe_file import recipe_text
from mlx_slim.config.schema import Recipe
from mlx_slim.distillation.run import distill
from mlx_slim.errors import ResourceError, TimeLimitError
from mlx_slim.events import Notice, Observer
from mlx_slim.export.fuse import fuse
from mlx_slim.export.options import FuseOptions
from mlx_slim.finetuning.run_dir import STATE_FILE
from mlx_slim.models.hub import resolve
from mlx_slim.planner.choose import Chosen, choose
from mlx_slim.planner.students import predict_run
from mlx_slim.quantization.calibration import DEFAULT_SOURCE
from mlx_slim.reading import ModelConfig
from mlx_slim.slimming.candidate import Candidate
from mlx_slim.slimming.material import Material

ROWS = 2000  # that a recovery learns from without a limit of time
FEWEST_BITS = 5  # a model of so many, and not cut, is not recovered: rounding costs nearly nothing
RECIPE, RUN = "recover.yaml", "recover"  # in the folder of a candidate


def recovers(candidate: Candidate) -> bool:
    """Return whether a candidate learns from the original."""
    mixed = candidate.bits_per_weight is not None
    return bool(candidate.cuts) or (not mixed and (candidate.bits or 16) < FEWEST_BITS)


def dense_of(material: Material, candidate: Candidate, folder: Path) -> str:
    """Return the model that learns: the original after all cuts, in the candidate's folder."""
    cuts = len(candidate.cuts)
    return str(folder / f"pruned-{cuts}") if cuts else material.source


def write_recipe(
    material: Material,
    candidate: Candidate,
    folder: Path,
    config: ModelConfig,
    *,
    limits: Sequence[float] = (),
    budget: int | None = None,
) -> None:
    """Write how a candidate learns from the original: all weights where they fit, else LoRA.

    Args:
        material: What it is made of.
        candidate: One that recovers.
        folder: Of it.
        config: Of the dense model after its cuts.
        limits: Seconds of the recovery: the first that is enough for some steps is taken; empty
            learns from ``ROWS`` rows.
        budget: Bytes of memory; None is what this machine has.

    Raises:
        ResourceError: If nothing fits.
        TimeLimitError: If no limit is enough.
        SlimError: If model or rows cannot be used.
    """
    teacher = {"model": material.source, "revision": material.revision}
    overrides = [
        f"distill.teachers={json.dumps([teacher])}",
        "distill.method=logits",
        "distill.weight=1.0",
        "report_answers=0",
        "train.keep=1",
    ]
    if candidate.bits is not None:
        overrides += ["quantize.qat=true", f"quantize.bits={candidate.bits}"]
    if material.revision is not None and not candidate.cuts:
        overrides.append(f"revision={material.revision}")
    if not limits:
        overrides.append(f"data.max_rows={ROWS}")

    def chosen(shapes: str, method: str, limits: Sequence[float] = limits) -> Chosen:
        try:
            return choose(
                shapes,
                material.data or DEFAULT_SOURCE,
                out=folder / RUN,
                method=method,
                budget=None if budget is None else f"{budget}B",
                time=f"{max(1, int(limits[0]))}s" if limits else None,
                overrides=overrides,
            )
        except TimeLimitError:
            if len(limits) < 2:
                raise
            return chosen(shapes, method, limits[1:])

    with _shapes(material, candidate, config) as shapes:
        try:
            choice = chosen(shapes, "full")
        except ResourceError:
            choice = chosen(shapes, "lora")
    values = choice.resolved.recipe.model_dump(mode="json", exclude_unset=True)
    values.pop("memory", None)  # of the machine that runs it
    values["model"] = dense_of(material, candidate, folder)
    reasons = {one.key: one.reason for one in choice.choices}
    header = [f"Recovers {candidate.key}, a candidate of mlx-slim slim."]
    text = recipe_text(Recipe.model_validate(values), reasons, header)
    write_text(folder / RECIPE, text)


@contextmanager
def _shapes(material: Material, candidate: Candidate, config: ModelConfig) -> Iterator[str]:
    """Yield a model that has a config and a tokenizer, and no weights."""
    if not candidate.cuts:
        yield material.source
        return
    with TemporaryDirectory() as name:
        for file in resolve(material.source, material.revision).iterdir():
            if file.is_file() and ".safetensors" not in file.name and file.name != "config.json":
                (Path(name) / file.name).symlink_to(file.resolve())
        write_json(Path(name) / "config.json", config)
        yield name


def recipe_of(folder: Path, *overrides: str) -> Resolved:
    """Return the recipe of a candidate's recovery."""
    return load_recipe(str(folder / RECIPE), overrides)


def peak_bytes(folder: Path, config: ModelConfig) -> int:
    """Return the predicted peak of a recovery.

    Args:
        folder: Of the candidate; the recipe is there.
        config: Of the dense model after its cuts.
    """
    recipe = recipe_of(folder).recipe
    return predict_run(config, recipe, suggest=False).predicted_peak_bytes


def recover(
    material: Material, candidate: Candidate, dense: str, folder: Path, observer: Observer
) -> None:
    """Make ``folder/model`` of the dense model; resume where that was begun."""
    run, train = folder / RUN, recipe_of(folder).recipe.train
    targets = material.targets / f"{train.batch_tokens}-{train.max_length}"
    overrides = [f"distill.cache={targets}"]
    if Path(recipe_of(folder).recipe.model).resolve() != Path(dense).resolve():
        overrides.append(f"model={dense}")  # a worker has the output folder elsewhere
    resolved = recipe_of(folder, *overrides)
    observer.notify(Notice(f"recovering {candidate.key}: {resolved.recipe.method}"))
    if not (run / "run.json").exists():
        distill(resolved, run, observer=observer, resume=(run / STATE_FILE).exists())
    if (run / "model").exists():
        (run / "model").rename(folder / "model")
    elif (run / "adapters").exists():
        fuse(dense, str(run / "adapters"), folder / "model", FuseOptions(calibration=material.data))
