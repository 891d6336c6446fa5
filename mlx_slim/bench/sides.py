"""One side of a benchmark, in its own process: our training, mlx-lm's, or a few of our steps.

Invariant: both sides see the same rows, model, dtype, adapter shape and BLAS; real tokens are the
ids of the rows, padding not counted; the first steps (compilation, caches) are not timed, and the
peak is counted from the moment the model is ready. Try it:
``mlx-slim bench train MODEL --data tatsu-lab/alpaca --against mlx-lm``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx_slim  # noqa: F401  # before mlx.core: both sides get the same BLAS
from mlx_slim.bench.rounds import process_peak_bytes, reset_process_peak, step_rates
from mlx_slim.reading import JsonObject

import mlx.core as mx  # isort: skip
from mlx.utils import tree_flatten  # isort: skip

if TYPE_CHECKING:
    from mlx_slim.events import StepDone
    from mlx_slim.training.loop import Loop

WARMUP_STEPS = 1
RANK, SCALE = 8, 2.0


@dataclass(frozen=True)
class TrainWork:
    """What a side trains.

    Attributes:
        model: Hub id or folder.
        rows: File of chat rows.
        method: ``full``, ``lora``, ``qlora`` or ``dora``.
        batch: Rows of a batch.
        max_length: Tokens of a row, at most.
        dtype: Computed in.
        compile: ``train.compile``; None is what the device does by default.
    """

    model: str
    rows: str
    method: str
    batch: int
    max_length: int
    dtype: str
    compile: bool | None = None


def _summary(timed: list[tuple[int, float]], setup: JsonObject) -> JsonObject:
    """Return tokens/s over the (tokens, seconds) of the timed steps, and the peak."""
    return {
        **step_rates(timed),
        "peak_memory_bytes": mx.get_peak_memory(),
        "process_peak_bytes": process_peak_bytes(),
        **setup,
    }


@contextlib.contextmanager
def training(work: TrainWork) -> Iterator[tuple[Loop, list[StepDone]]]:
    """Yield our loop of ``work``, ready to run, and the list that its steps will be in."""
    from mlx_slim import events
    from mlx_slim.config.load import from_values
    from mlx_slim.finetuning.build import build_loop, prepare_data, prepare_model
    from mlx_slim.runtime import memory_limits

    values = {
        "model": work.model,
        "method": work.method,
        "adapter": {"rank": RANK, "scale": SCALE},
        "data": {"path": work.rows, "validation": 0},
        "train": {
            "epochs": 1 if work.compile is None else 2,
            "compile": "auto" if work.compile is None else work.compile,
            "batch_tokens": work.batch * work.max_length,
            "max_length": work.max_length,
            "save_every": 10**9,
            "dtype": work.dtype,
        },
    }
    recipe = from_values(values, "bench", "bench").recipe
    steps: list[StepDone] = []

    class Steps:
        def notify(self, event: events.Event) -> None:
            if isinstance(event, events.StepDone):
                steps.append(event)

    with tempfile.TemporaryDirectory() as folder, memory_limits():
        tuned = prepare_model(recipe)
        data = prepare_data(recipe, tuned, Path(folder), unchanged=False)
        yield build_loop(recipe, tuned, data, Path(folder), Steps(), budget=0), steps


def ours(work: TrainWork) -> JsonObject:
    """Train with our loop: an epoch, or (``work.compile`` is set) two, the second timed."""
    with training(work) as (loop, steps):
        trainable: dict[str, mx.array] = dict(tree_flatten(loop.model.trainable_parameters()))
        trained = sum(parameter.size for parameter in trainable.values())
        mx.reset_peak_memory()
        reset_process_peak()
        loop.run()
    timed = [(step.tokens, step.tokens / step.tokens_per_second) for step in steps]
    computed = sum(step.computed_tokens for step in steps)
    setup: JsonObject = {
        "computed_tokens": computed,
        "batching": loop.batcher.mode,
        "trained_parameters": trained,
    }
    if work.compile is None:
        return _summary(timed[WARMUP_STEPS:], setup)
    plans = [loop.batcher.plan(epoch) for epoch in (0, 1)]
    batches = [loop.batcher.batch(groups) for plan in plans for groups in plan]
    shapes = [(*batch.tokens_BT.shape, len(batch.targets_N)) for batch in batches]
    setup["shapes"] = len(set(shapes))
    setup["first_epoch_seconds"] = sum(seconds for _, seconds in timed[: len(plans[0])])
    # A compiled step that meets its shape for the first time is traced.
    warm = [
        pair
        for index, pair in enumerate(timed)
        if index >= len(plans[0]) and (not work.compile or shapes[index] in shapes[:index])
    ]
    return _summary(warm, setup)


def _stock(work: TrainWork) -> tuple[Any, Any]:
    """Return model and tokenizer as mlx-lm itself loads them, in the dtype of the benchmark."""
    from mlx_lm import load

    from mlx_slim.models.opening import cast as cast_model
    from mlx_slim.runtime import resolve_dtype

    model, tokenizer = load(work.model)[:2]
    cast_model(model, resolve_dtype(work.dtype))
    return model, tokenizer


def mlx_lm(work: TrainWork) -> JsonObject:
    """Train one epoch with mlx-lm's own trainer, data sets and adapters."""
    import mlx.optimizers as optim
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from mlx_slim.artifacts import read_records

    model, tokenizer = _stock(work)
    model.freeze()
    settings = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    linear_to_lora_layers(model, -1, settings, use_dora=work.method == "dora")
    rows = list(read_records(Path(work.rows)))
    lengths: list[int] = []

    class Recording(CacheDataset):
        def __getitem__(self, index: int) -> Any:
            item: Any = super().__getitem__(index)
            lengths.append(len(item[0]))
            return item

    steps = len(rows) // work.batch
    moments = [0.0]

    class StepClock(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            moments.append(time.perf_counter())

    data = Recording(ChatDataset(rows, cast(Any, tokenizer), mask_prompt=True))
    mx.eval(model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArgs(
            batch_size=work.batch,
            iters=steps,
            steps_per_report=1,
            steps_per_save=10**9,
            max_seq_length=work.max_length,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        mx.reset_peak_memory()
        reset_process_peak()
        moments[0] = time.perf_counter()
        train(
            model,
            optim.AdamW(learning_rate=2e-4),
            data,
            args=arguments,
            training_callback=StepClock(),
        )
    batch = work.batch
    tokens = [sum(lengths[i * batch : (i + 1) * batch]) for i in range(steps)]
    seconds = [after - before for before, after in itertools.pairwise(moments)]
    return _summary(list(zip(tokens, seconds, strict=True))[WARMUP_STEPS:], {})


@dataclass(frozen=True)
class Peaks:
    """A few steps of a recipe's largest batch: predicted and measured.

    Attributes:
        predicted_peak_bytes: Of memory.
        measured_peak_bytes: Of memory.
        breakdown: The prediction, component by component, bytes.
        computed_tokens: Of a batch, padding included.
        seconds_per_batch: Measured.
    """

    predicted_peak_bytes: int
    measured_peak_bytes: int
    breakdown: dict[str, int]
    computed_tokens: int
    seconds_per_batch: float


def probe(values: JsonObject) -> Peaks:
    """Take two steps of the largest batch of a recipe with these ``values``."""
    from mlx_slim import events
    from mlx_slim.config.load import from_values
    from mlx_slim.finetuning.profile import probe as take_steps
    from mlx_slim.models.load import read_config
    from mlx_slim.planner.memory import predict
    from mlx_slim.planner.suggest import changed

    recipe = from_values(values, "bench", "bench").recipe
    measured = take_steps(recipe, events.Broadcast([]), steps=2)
    config = read_config(recipe.model)
    recipe = changed(recipe, {"train.batching": measured.batching})
    predicted = predict(config, recipe, lengths=measured.lengths, suggest=False)
    return Peaks(
        predicted_peak_bytes=predicted.predicted_peak_bytes,
        measured_peak_bytes=measured.peak_memory_bytes,
        breakdown=predicted.breakdown,
        computed_tokens=measured.computed_tokens,
        seconds_per_batch=measured.seconds_per_batch,
    )


def main() -> None:
    """Run the side named first with the work given as JSON; print one line of JSON."""
    name, work = sys.argv[1], json.loads(sys.argv[2])
    with contextlib.redirect_stdout(sys.stderr):
        if name == "probe":
            result = asdict(probe(work))
        else:
            result = {"ours": ours, "mlx-lm": mlx_lm}[name](TrainWork(**work))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
