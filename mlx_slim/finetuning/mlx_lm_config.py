"""The configuration of an ``mlx_lm.lora`` run, read as a recipe of ours.

Invariant: every key of the file is translated, or listed as one without a counterpart, or refused;
keys that the file leaves out have mlx-lm's defaults, so the recipe is the run that mlx-lm would
make, but for the differences that are listed. Try it:
``mlx-slim recipes --from-mlx-lm lora_config.yaml``.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_slim.config.load import Resolved, from_layers
from mlx_slim.config.recipe_file import recipe_text
from mlx_slim.config.schema import Recipe
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.finetuning.mlx_lm_file import DEFAULTS, LORA, SCHEDULE, SOURCE, ConfigFile, read_file
from mlx_slim.planner.rows import expected_rows
from mlx_slim.reading import JsonObject

OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")
_OPTIONS = ("betas", "eps", "weight_decay", "bias_correction")
# of mlx's classes, where they have one
_DECAY = {"adamw": 0.01, "muon": 0.01, "adafactor": 0.0, "sgd": 0.0, "adam": 0.0}
_FEATURES = {
    "prompt_feature": "prompt",
    "completion_feature": "completion",
    "text_feature": "text",
    "chat_feature": "messages",
}
# Without a counterpart: key -> what is done instead.
_ABSENT = {
    "val_batches": "every validation uses all validation rows",
    "test": "score a run with mlx-slim eval, or the same rows with train --validate",
    "test_batches": "see test",
    "clear_cache_threshold": "MLX may keep an eighth of memory.budget as free buffers",
    "project_name": "trackers use the name of the recipe",
    "adapter_path": "name the run folder with -o; adapters are in RUN/adapters",
    "trust_remote_code": "Python files of a repository are not run in training",
}


@dataclass
class Translation:
    """A recipe, and what is not as in the file.

    Attributes:
        values: Of the recipe, nested.
        reasons: Dotted key of the recipe -> where its value is from.
        differences: One line each: what computes otherwise.
        absent: One line for each key that has no counterpart.
    """

    values: JsonObject = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any, reason: str) -> None:
        """Set a dotted key of the recipe."""
        *sections, name = key.split(".")
        inside = self.values
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[name] = value
        self.reasons[key] = reason

    def resolved(self, name: str) -> Resolved:
        """Return the recipe, checked."""
        return from_layers([(self.values, "mlx_lm.lora")], name)


def read_mlx_lm(path: Path) -> tuple[Recipe, str, Translation]:
    """Return the recipe of an ``mlx_lm.lora`` configuration, its file, and what differs.

    Args:
        path: A YAML file, as for ``mlx_lm.lora --config``.

    Raises:
        SlimError: If it cannot be read, or holds a key or a value that mlx-lm does not know.
    """
    file, result = read_file(path), Translation()
    for translate in (_model, _adapter, _data, _optimizer, _schedule, _steps, _others):
        translate(file, result)
    for key, instead in _ABSENT.items():
        if file.values[key] not in (False, DEFAULTS[key]):
            result.absent.append(f"{key}: {instead}")
    resolved = result.resolved(path.stem)
    _batches(file, result, resolved.recipe)
    recipe = result.resolved(path.stem).recipe
    header = [f"From {path.name}, a configuration of mlx_lm.lora.", "", "It differs:"]
    header += [f"- {line}" for line in result.differences]
    if result.absent:
        header += ["", "Keys without a counterpart:", *(f"- {line}" for line in result.absent)]
    return recipe, recipe_text(recipe, result.reasons, header), result


def _model(file: ConfigFile, result: Translation) -> None:
    kind = file.values["fine_tune_type"]
    if kind not in ("lora", "dora", "full"):
        raise file.error(("fine_tune_type",), "lora, dora or full")
    result.set("model", file.values["model"], "model")
    result.set("method", kind, "fine_tune_type")
    result.set("train.seed", file.values["seed"], "seed; its random numbers are others")
    if not file.values["train"]:
        result.absent.append("train: false, which only tests; this recipe trains")


def _adapter(file: ConfigFile, result: Translation) -> None:
    layers = file.whole("num_layers", -1)
    if file.values["fine_tune_type"] == "full":
        if layers > 0:
            result.differences.append(
                f"num_layers={layers}: mlx-lm trains the last {layers} blocks; method=full trains "
                "every weight, embeddings and norms included"
            )
        return
    lora = file.inner("lora_parameters", LORA)
    rank, scale = lora["rank"], lora["scale"]
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise file.error(("lora_parameters", "rank"), "a whole number from 1")
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise file.error(("lora_parameters", "scale"), "a number")
    result.set("adapter.rank", rank, "lora_parameters.rank")
    result.set("adapter.scale", scale, f"lora_parameters.scale; as alpha: {scale * rank:g}")
    result.set("adapter.dropout", lora["dropout"], "lora_parameters.dropout")
    result.set("adapter.targets", lora["keys"] or "all-linear", "lora_parameters.keys")
    result.set("adapter.layers", layers if layers > 0 else "all", "num_layers, from the last")
    result.differences.append(
        f"scale: mlx-lm's {scale:g} is the factor of BA itself, whatever the rank; alpha / rank "
        f"would be {scale * rank:g} / {rank}"
    )


def _data(file: ConfigFile, result: Translation) -> None:
    source: JsonObject = {}
    path = file.values["data"]
    if (dataset := file.values["hf_dataset"]) is not None:
        if isinstance(dataset, list) or not isinstance(dataset, dict) or "path" not in dataset:
            raise file.error(("hf_dataset",), "one data set with a path", "convert one at a time")
        source = file.inner("hf_dataset", dict.fromkeys(SOURCE))
        name = (source["config"] or {}).get("name")
        path = f"{source['path']}:{name}" if name else source["path"]
        split = source["train_split"] or "train[:80%]"
        result.set("data.path", [{"path": path, "split": split}], "hf_dataset, train_split")
        result.absent.append(
            f"hf_dataset.valid_split ({source['valid_split'] or 'train[-10%:]'}): "
            "rows of the training split validate"
        )
    else:
        result.set("data.path", path, "data")
    columns = {
        ours: value
        for key, ours in _FEATURES.items()
        if (value := source.get(key) or file.values[key]) and value != ours
    }
    if columns:
        result.set("data.columns", columns, "the names of the features")
    folder = Path(str(path)).expanduser()
    if (folder / "valid.jsonl").is_file():
        result.set("data.validation", str(path), "valid.jsonl beside train.jsonl")
    elif folder.is_dir():
        result.set("data.validation", 0, "there is no valid.jsonl")
    result.set("data.mask_prompt", file.values["mask_prompt"], "mask_prompt")
    result.set("data.template", "auto", "the model's chat template, as mlx-lm")
    result.set("data.truncation", "right", "mlx-lm cuts longer rows at max_seq_length")
    if file.values["mask_prompt"]:
        text = "mask_prompt: mlx-lm learns the last answer of a conversation; so does data.learn"
        result.set("data.learn", "last", "mask_prompt")
        result.differences.append(f"{text}=last; of a row of `text` everything is learned")
    result.differences.append(
        "mlx-lm also learns one padding token behind each shorter row; here none is"
    )


def _optimizer(file: ConfigFile, result: Translation) -> None:
    name = file.values["optimizer"]
    if name not in OPTIMIZERS:
        raise file.error(("optimizer",), "one of " + ", ".join(OPTIMIZERS))
    every = file.inner("optimizer_config", dict.fromkeys(OPTIMIZERS))
    options = every[name] or {}
    if not isinstance(options, dict):
        raise file.error(("optimizer_config", name), "`key: value` lines")
    result.set("train.optimizer", name, "optimizer")
    decay = options.get("weight_decay", _DECAY[name])
    result.set("train.weight_decay", decay, f"of mlx's {name}")
    if decay:
        result.set("train.decay_all", True, "mlx decays vectors too")
    result.set("train.clip", 0.0, "mlx-lm does not clip gradients")
    if name in ("adam", "adamw") and not options.get("bias_correction", False):
        result.differences.append(
            f"bias correction: mlx-lm's {name} has none, so that its first steps are up to three "
            "times as large; here Adam is corrected"
        )
    for key in options:
        if key not in ("weight_decay", "bias_correction"):
            result.absent.append(f"optimizer_config.{name}.{key}: mlx's default is used")


def _schedule(file: ConfigFile, result: Translation) -> None:
    rate, kind, warmup, floor = file.values["learning_rate"], "constant", 0, 0.0
    if file.values["lr_schedule"] is not None:
        chosen = file.inner("lr_schedule", SCHEDULE)
        arguments = chosen["arguments"]
        if not _is_schedule(arguments):
            expected = "a list of numbers, the first one, the rate, above 0"
            hint = "a rise from 0 is lr_schedule.warmup: STEPS"
            raise file.error(("lr_schedule", "arguments"), expected, hint)
        rate, warmup = arguments[0], chosen["warmup"]
        kind, floor = _shape(file, chosen["name"], arguments, result)
        if chosen["warmup_init"]:
            result.differences.append(
                f"lr_schedule.warmup_init={chosen['warmup_init']}: the warm-up begins at the peak "
                "divided by its steps"
            )
    result.set("train.learning_rate", rate, "lr_schedule" if floor or warmup else "learning_rate")
    result.set("train.schedule", kind, "lr_schedule")
    result.set("train.warmup", warmup, "lr_schedule.warmup, steps")
    result.set("train.min_lr_ratio", floor, "of the end of lr_schedule")


def _is_schedule(arguments: Any) -> bool:
    """Return whether these are the arguments of a schedule that begins at a rate above 0."""
    if not isinstance(arguments, list) or not arguments:
        return False
    numbers = all(isinstance(one, int | float) and one is not True for one in arguments)
    return numbers and arguments[0] > 0


def _shape(
    file: ConfigFile, name: Any, arguments: list[float], result: Translation
) -> tuple[str, float]:
    """Return our schedule for one of mlx's, and the final rate as a fraction of the first."""
    if name == "cosine_decay":
        if len(arguments) < 2:
            raise file.error(("lr_schedule", "arguments"), "the rate and the steps of its decay")
        steps, end = (*arguments[1:3], 0.0)[:2]
        kind = "cosine"
    elif name == "linear_schedule" and len(arguments) == 3 and arguments[1] <= arguments[0]:
        kind, end, steps = "linear", arguments[1], arguments[2]
    elif name in ("exponential_decay", "step_decay", "linear_schedule"):
        result.differences.append(
            f"lr_schedule {name}: there is none here; the rate stays constant"
        )
        return "constant", 0.0
    else:
        hint = did_you_mean(str(name), ("cosine_decay", "linear_schedule", "step_decay"))
        raise file.error(("lr_schedule", "name"), "a schedule of mlx.optimizers", hint)
    result.differences.append(
        f"lr_schedule {name}: mlx-lm's ends after {steps:g} steps, this one with the last step"
    )
    return kind, float(f"{end / arguments[0]:.6g}")


def _steps(file: ConfigFile, result: Translation) -> None:
    pieces = file.whole("grad_accumulation_steps")
    iterations = file.whole("iters")
    steps = max(1, iterations // pieces)
    result.set("train.steps", steps, f"iters={iterations:,} batches, {pieces} a step")
    result.set("train.accumulate", pieces, "grad_accumulation_steps")
    for theirs, ours in (
        ("steps_per_eval", "validate_every"),
        ("save_every", "save_every"),
        ("steps_per_report", "log_every"),
    ):
        every = max(1, file.whole(theirs) // pieces)
        result.set(f"train.{ours}", every, f"{theirs}, in optimizer steps")


def _others(file: ConfigFile, result: Translation) -> None:
    result.set("train.max_length", file.whole("max_seq_length"), "max_seq_length")
    result.set("train.grad_checkpoint", file.values["grad_checkpoint"], "grad_checkpoint")
    trackers = [name.strip() for name in str(file.values["report_to"] or "").split(",")]
    if "wandb" in trackers:
        result.set("report_to", ["wandb"], "report_to")
    result.absent += [f"report_to={name}" for name in trackers if name not in ("", "wandb")]
    if start := file.values["resume_adapter_file"]:
        folder = Path(str(start)).parent
        result.set("adapter.init_from", str(folder), "the folder of resume_adapter_file")


def _batches(file: ConfigFile, result: Translation, recipe: Recipe) -> None:
    """Set the tokens of a micro-batch, from its rows and their length where they can be read.

    A micro-batch holds the longest row at least. Where that is more than mlx-lm's rows have, fewer
    micro-batches are accumulated; rows that a step has more even so are a difference.
    """
    rows, pieces = file.whole("batch_size"), recipe.train.accumulate
    longest = recipe.train.max_length
    estimate = None
    with contextlib.suppress(SlimError):  # the data may be on another machine
        estimate = expected_rows(recipe, local=True)
    mean = longest if estimate is None else max(1, round(estimate.tokens / estimate.rows))
    tokens = max(longest, rows * mean)
    basis = f"{rows} rows of about {mean:,} tokens"
    if estimate is None:
        basis = f"{rows} rows of {longest:,} tokens: the data is not here to count them"
    elif tokens > rows * mean:
        basis += f"; as large as the longest row (max_seq_length={longest:,})"
    accumulate = max(1, round(pieces * rows * mean / tokens))
    result.set("train.batch_tokens", tokens, f"batch_size: {basis}")
    if accumulate < pieces:
        why = f"grad_accumulation_steps={pieces}, of smaller batches"
        result.set("train.accumulate", accumulate, why)
    result.differences.append(
        f"batches: mlx-lm's have {rows} rows, whatever their length; here {tokens:,} tokens are "
        f"the most ({basis}), many short rows or few long ones"
    )
    ours, theirs = round(accumulate * tokens / mean), pieces * rows
    if ours > 1.2 * theirs:
        result.differences.append(
            f"rows of a step: about {ours:,}, mlx-lm's has {theirs:,}, so that the same steps "
            f"train on {ours / theirs:.1f} times the rows; with a lower train.max_length (longer "
            "rows are cut) train.batch_tokens can be lower too"
        )
    if pieces > 1:
        result.differences.append(
            "accumulation: mlx-lm averages the means of the batches; here every token counts alike"
        )
    result.differences.append("dtype: mlx-lm computes in the model's; see train.dtype")
