"""The Python API: what the commands do, as typed functions.

Invariant: each calls the workflow that its command calls, with the same defaults and the same
objects out; nothing is printed, and errors are ``SlimError``. ``import mlx_slim`` brings none of
this: it is imported when one of them is used. Try it:
``python -c "import mlx_slim; print(mlx_slim.plan('tinyllama-lora').predicted_peak_bytes)"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mlx_slim import events
from mlx_slim.config.python import AnyRecipe, override_text, resolved_recipe
from mlx_slim.distillation import run as teaching
from mlx_slim.evaluation import run as scoring
from mlx_slim.evaluation.options import EvalOptions
from mlx_slim.finetuning import profile
from mlx_slim.finetuning.run_dir import Result
from mlx_slim.planner import choose as choosing
from mlx_slim.planner import run as planning
from mlx_slim.planner.memory import Prediction
from mlx_slim.pruning import run as pruning
from mlx_slim.pruning.options import PruneOptions
from mlx_slim.quantization import run as compress
from mlx_slim.quantization.policy import quantize_config
from mlx_slim.reading import JsonObject
from mlx_slim.rewards import run as rewards
from mlx_slim.slimming import run as slimming
from mlx_slim.slimming.options import SlimOptions
from mlx_slim.slimming.records import SlimReport
from mlx_slim.sweeping.options import SweepOptions
from mlx_slim.sweeping.records import SweepReport

Source = str | Path


def _learn(
    workflow: Callable[..., Result],
    recipe: AnyRecipe,
    out: Source,
    overrides: Mapping[str, Any] | None,
    resume: bool,
    observer: events.Observer | None,
) -> Result:
    listener = observer or events.Broadcast([])
    return workflow(resolved_recipe(recipe, overrides), Path(out), observer=listener, resume=resume)


def finetune(
    recipe: AnyRecipe,
    out: Source,
    *,
    overrides: Mapping[str, Any] | None = None,
    reward: Source | None = None,
    resume: bool = False,
    observer: events.Observer | None = None,
) -> Result:
    """Fine-tune as ``mlx-slim train`` does: on answers, or with ``preference`` on a comparison.

    Args:
        recipe: A shipped recipe's name, a YAML file, the values of a recipe, or a ``Resolved``.
        out: The run folder; must be new unless ``resume``.
        overrides: Dotted keys and their values: ``{"train.steps": 100}``.
        reward: ``FILE.py:FUNCTION`` that scores drawn answers, as ``--reward``; it is run.
        resume: Continue from the newest checkpoint, bit for bit.
        observer: Hears of every event (``mlx_slim.events``).

    Raises:
        SlimError: Bad input, or a resume with another recipe or other data.
        ResourceError: Over the memory budget or out of disk, before training.
        Interrupted: Ctrl-C; the state is saved.
    """
    learn = partial(rewards.train, reward=None if reward is None else str(reward))
    return _learn(learn, recipe, out, overrides, resume, observer)


def choose(
    model: Source,
    data: Source,
    out: Source,
    *,
    overrides: Mapping[str, Any] | None = None,
    method: str | None = None,
    budget: str | int | None = None,
    time: str | None = None,
) -> choosing.Chosen:
    """Choose a recipe as ``mlx-slim train MODEL --data ROWS`` does; ``finetune`` runs it.

    Args:
        model: Folder or hub id.
        data: Rows: a file, a folder or a hub id.
        out: The folder that the run will have; nothing is put there.
        overrides: As in ``finetune``: values that are not chosen.
        method: ``full``, ``lora``, ``qlora`` or ``dora``; None chooses.
        budget: Bytes, or a size such as ``12GB``; None is what the device can hold.
        time: Longest predicted time, such as ``2h``; None is as long as the rows are worth.

    Returns:
        ``resolved`` for ``finetune``, and each choice with its reason.

    Raises:
        SlimError: Bad input, or too little time.
        ResourceError: If nothing fits the budget.
    """
    words = [f"{key}={override_text(value)}" for key, value in (overrides or {}).items()]
    size = None if budget is None else str(budget)
    return choosing.choose(
        str(model),
        str(data),
        out=Path(out),
        method=method,
        budget=size,
        time=time,
        overrides=words,
    )


def distill(
    recipe: AnyRecipe,
    out: Source,
    *,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    observer: events.Observer | None = None,
) -> Result:
    """Train a student on its rows and on what teachers say of them, as ``mlx-slim distill`` does.

    Args:
        recipe: As in ``finetune``; its ``distill`` section names the teachers.
        out: The run folder; must be new unless ``resume``.
        overrides: As in ``finetune``: ``{"distill.teachers": [{"model": "BIGGER"}]}``.
        resume: Continue with the next teacher response or the next step.
        observer: Hears of every event.

    Raises:
        SlimError: Bad input, or tokenizers that do not agree where they must.
        ResourceError: Over the memory budget or out of disk, before the work.
        Interrupted: Ctrl-C; the state is saved.
    """
    return _learn(teaching.distill, recipe, out, overrides, resume, observer)


def plan(
    recipe: AnyRecipe,
    *,
    overrides: Mapping[str, Any] | None = None,
    budget: str | int | None = None,
    mac: str | None = None,
    probe: bool = False,
) -> Prediction:
    """Predict peak memory, time and disk as ``mlx-slim plan`` does.

    Args:
        recipe: As in ``finetune``.
        overrides: As in ``finetune``.
        budget: Bytes, or a size such as ``16GB``.
        mac: Plan for a Mac, such as ``m2-16gb``.
        probe: Measure three real steps of the largest batch here.

    Raises:
        SlimError: Bad input.
    """
    chosen = resolved_recipe(recipe, overrides).recipe
    return planning.plan(chosen, budget=budget, mac=mac, probe=profile.probe if probe else None)[0]


def quantize(
    model: Source,
    out: Source,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    method: str = "rtn",
    embed_bits: Literal[2, 3, 4, 5, 6, 8] | None = None,
    calibration: str | None = None,
    samples: int = compress.CompressOptions.samples,
    length: int = compress.CompressOptions.length,
    fidelity_samples: int = compress.CompressOptions.fidelity_samples,
    revision: str | None = None,
    target_bytes: int | None = None,
    bits_per_weight: float | None = None,
    sensitivity: Literal["rules", "measured"] | None = None,
    compensate: int | None = None,
    observer: events.Observer | None = None,
) -> compress.Compressed:
    """Quantize ``model`` into the new folder ``out`` as ``mlx-slim quantize`` does.

    Args:
        model: MLX or Hugging Face folder, or hub id.
        out: Must not exist.
        bits: 2, 3, 4, 5, 6 or 8; None is 4 (8 for mxfp8).
        group_size: Weights that share a scale; None is 64, or what the mode fixes.
        mode: ``affine``, ``mxfp4``, ``mxfp8`` or ``nvfp4``.
        method: ``rtn``, ``awq``, ``gptq``, ``dwq``, ``dynamic`` or ``blockwise``.
        embed_bits: Bits of embedding and head; None is the method's choice.
        calibration: Text or data set to calibrate and judge on; None is Alpaca.
        samples: Calibration rows, at most.
        length: Tokens of a calibration row.
        fidelity_samples: Rows, not used for calibration, that the result is compared on; 0: none.
        revision: Commit or tag of a hub model.
        target_bytes: Most bytes of the files of weights: each layer gets bits of its own.
        bits_per_weight: The same as bits of all parameters for each weight.
        sensitivity: For such a size: ``measured`` (None too), one layer at a time, or ``rules``.
        compensate: Rank of an adapter in ``out/adapters`` that corrects the error, untrained.
        observer: Hears a notice for each stage.

    Raises:
        SlimError: If anything given cannot be used.
        ResourceError: If memory or disk do not suffice.
    """
    sized = target_bytes is not None or bits_per_weight is not None
    options = compress.CompressOptions(
        quantize=quantize_config(bits, group_size, mode, sized=sized),
        method=method,
        embed_bits=embed_bits,
        calibration=calibration,
        samples=samples,
        length=length,
        fidelity_samples=fidelity_samples,
        revision=revision,
        target_bytes=target_bytes,
        bits_per_weight=bits_per_weight,
        sensitivity=sensitivity,
        compensate=compensate,
    )
    return compress.compress(model, Path(out), options, observer)


def prune(
    model: Source,
    out: Source,
    *,
    ratio: float | None = None,
    method: str | None = None,
    layers: str | None = None,
    target_params: int | None = None,
    calibration: str | None = None,
    options: PruneOptions | None = None,
    observer: events.Observer | None = None,
) -> pruning.Pruned:
    """Prune ``model`` into the new folder ``out`` as ``mlx-slim prune`` does.

    Args:
        model: Folder or hub id of a dense model.
        out: Must not exist.
        ratio: Share of the layers, or of the groups of each layer.
        method: Of depth or width, see ``PruneOptions``; None is ``taylor``.
        layers: Layers by number, such as ``21-29``, instead of a method and a size.
        target_params: Most parameters that may stay.
        calibration: Text or data set; None is Alpaca.
        options: Everything else; what is given above wins.
        observer: Hears a notice for each stage.

    Raises:
        SlimError: If anything given cannot be used.
        ResourceError: If memory or disk do not suffice.
    """
    chosen_options = {
        "ratio": ratio,
        "method": method,
        "layers": layers,
        "target_params": target_params,
        "calibration": calibration,
    }
    chosen = {key: value for key, value in chosen_options.items() if value is not None}
    settings = replace(options or PruneOptions(), **chosen)
    return pruning.prune(model, Path(out), settings, observer)


def evaluate(
    model: Source | Sequence[Source],
    tasks: str | Sequence[str],
    out: Source,
    *,
    adapter: Source | Sequence[Source] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    data_dir: Source | None = None,
    options: EvalOptions | None = None,
    resume: bool = False,
    observer: events.Observer | None = None,
) -> list[JsonObject]:
    """Score models on tasks as ``mlx-slim eval`` does; return the results of each.

    Args:
        model: Folder or hub id, or several.
        tasks: Names of tasks and suites, or paths of task files.
        out: The output folder; must be new unless ``resume``.
        adapter: Adapter folder to put on every model; of several (``DIR`` or ``DIR=WEIGHT``) the
            weighted sum.
        limit: First rows of a task (of each subject of a group).
        num_fewshot: Solved examples before each question; None takes the task's own.
        data_dir: Data mirror; None takes ``MLX_SLIM_DATA``, else the hub.
        options: Everything else; what is given above wins.
        resume: Continue the evaluation in ``out``.
        observer: Hears of every event.

    Raises:
        SlimError: Whatever is wrong with the input, before any weight is read.
        ResourceError: Not enough memory or disk.
        Interrupted: Ctrl-C; what is computed stays.
    """
    chosen_options = {
        "adapter": adapter,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "data_dir": None if data_dir is None else Path(data_dir),
    }
    chosen = {key: value for key, value in chosen_options.items() if value is not None}
    settings = replace(options or EvalOptions(), **chosen)
    return scoring.evaluate(model, tasks, Path(out), settings, resume=resume, observer=observer)


def slim(
    model: Source,
    out: Source,
    options: SlimOptions,
    *,
    resume: bool = False,
    observer: events.Observer | None = None,
) -> SlimReport:
    """Search for a smaller model that keeps its score, as ``mlx-slim slim`` does.

    Args:
        model: MLX or Hugging Face folder, or hub id, not quantized.
        out: The folder of the search; must be new unless ``resume``.
        options: Budget, demand and tasks; of several ``workers`` each candidate has a process.
        resume: Continue a search that was interrupted.
        observer: Hears of every event.

    Returns:
        What ``slim.json`` says; the chosen model is in ``out/model``.

    Raises:
        SlimError: Bad input, a budget that nothing meets, or a share that cannot be shown.
        ResourceError: If memory or disk do not suffice.
    """
    listener = observer or events.Broadcast([])
    return slimming.slim(model, Path(out), options, listener, resume=resume)


def sweep(
    recipe: AnyRecipe,
    space: Source,
    out: Source,
    options: SweepOptions | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    observer: events.Observer | None = None,
) -> SweepReport:
    """Search the hyperparameters of a recipe, as ``mlx-slim sweep`` does.

    One worker trains in this process; of several each trial has its own.

    Args:
        recipe: As in ``finetune``.
        space: A shipped space's name, or the path of a ``.yaml`` file: dotted recipe keys, each a
            list of choices or ``{low, high, log, step}``.
        out: The folder of the sweep; must be new unless ``resume``.
        options: Trials, objectives, pruner, seeds and workers; None takes the defaults.
        overrides: As in ``finetune``.
        resume: Continue a sweep that was interrupted, or try more.
        observer: Hears of every event.

    Returns:
        What ``sweep.json`` says; the best trial's recipe is ``out/winner.yaml``.

    Raises:
        SlimError: Bad input, or no trial is complete.
        ResourceError: Out of disk.
        Interrupted: Ctrl-C; what has ended is kept, and the states of running trials.
    """
    from mlx_slim.sweeping import run as sweeping  # Optuna takes a second

    chosen = options or SweepOptions()
    listener = observer or events.Broadcast([])
    return sweeping.sweep(
        resolved_recipe(recipe, overrides),
        str(space),
        Path(out),
        chosen,
        listener,
        resume=resume,
        processes=chosen.several,
    )
