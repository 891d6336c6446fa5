"""The comparisons of the self-test: each measures one difference and says how much is allowed.

Invariant: what is compared is what the commands run (``build_loop``, ``finetune``, the scorers), on
the default device and in its default dtype; what it is compared with is as plain as possible. The
tolerances are in ``ALLOWED``, with what they are measured against. Try it:
``mlx-slim doctor --self-test``.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_slim import events
from mlx_slim.artifacts import load_tensors, read_records
from mlx_slim.bench.plain_step import PlainModel, largest_difference
from mlx_slim.bench.rounds import run_side
from mlx_slim.config.load import Resolved, from_values
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.data.batches import Batch, collate
from mlx_slim.evaluation.scoring.generate import generate_batch
from mlx_slim.evaluation.scoring.loglikelihood import LoglikelihoodScorer
from mlx_slim.evaluation.scoring.plain import plain_logits, plain_score
from mlx_slim.evaluation.scoring.requests import Request
from mlx_slim.finetuning.build import Tuned, build_loop, prepare_data, prepare_model
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.load import load
from mlx_slim.models.logits_close import Change, logits_close
from mlx_slim.quantization.apply import quantize_model
from mlx_slim.reading import JsonObject
from mlx_slim.runtime import resolve_dtype
from mlx_slim.training.loop import Loop
from mlx_slim.training.optim import set_trainable, trainable

METHODS = {"full": "full", "qlora": "LoRA over 4 bits"}
MEMORY_METHODS = ("full", "lora", "qlora")
RESUME_STEPS, STOP_AFTER = 6, 3
NEW_TOKENS = 12

# What may differ -> (in float32, in 16 bits). Measured: float32 on a CPU 1e-6 and less everywhere;
# bfloat16 with sums in float32, as a GPU has them, 2e-4 (loss), 1.3e-2 (gradient), 1.5e-2 (logits).
ALLOWED: dict[str, tuple[float, float]] = {
    "loss": (1e-5, 5e-3),  # |a - e| / e
    "gradient": (1e-4, 5e-2),  # largest over the tensors of norm(a - e) / norm(e)
    "same step": (1e-4, 5e-2),  # both of these, between two ways of the same dtype
    "logits": (1e-4, 5e-2),  # largest |a - e| / largest |e|
    "nats": (1e-4, 1e-1),  # of a continuation's log-likelihood
    "memory": (0.3, 0.3),  # |predicted / measured - 1|; of a model this small
}


class Deviation(NamedTuple):
    """One difference.

    Attributes:
        what: The line of the table.
        value: What was measured; smaller is better.
        allowed: The largest value that is right; None where a value is only reported.
        unit: Of both; empty for a ratio.
        where: What it was measured at, such as a tensor; empty if that says nothing.
    """

    what: str
    value: float
    allowed: float | None
    unit: str = ""
    where: str = ""


@dataclass(frozen=True)
class Place:
    """What the checks work on.

    Attributes:
        model: Folder of the small random model.
        rows: Its training rows.
        folder: Temporary, for runs.
    """

    model: Path
    rows: Path
    folder: Path

    def recipe(self, method: str, **train: Any) -> Resolved:
        """Return a small recipe for ``method``."""
        values = {
            "model": str(self.model),
            "method": method,
            "quantize": {"group_size": 32},
            "data": {"path": str(self.rows), "validation": 0},
            "report_answers": 0,
            "train": {"batch_tokens": 512, "max_length": 256, "learning_rate": 1e-3, **train},
        }
        return from_values(values, "self-test", "self-test")


def allowed(what: str) -> float:
    """Return the tolerance of ``what`` in the dtype that this machine computes in."""
    return ALLOWED[what][0 if resolve_dtype("auto") == mx.float32 else 1]


# ------------------------------------------------------------------------------------- training


@contextlib.contextmanager
def _loop(place: Place, method: str, **train: Any) -> Iterator[tuple[Tuned, Loop]]:
    """Build a run as ``finetune`` does, over adapters that already do something."""
    recipe = place.recipe(method, **train).recipe
    rows = place.folder / f"{method}-{len(list(place.folder.iterdir()))}"
    tuned = prepare_model(recipe)
    factors = trainable(tuned.model)
    mx.random.seed(1)
    # As they begin, B is zero and A has no gradient.
    changed = {p: 0.02 * mx.random.normal(v.shape) for p, v in factors.items() if "lora_b" in p}
    set_trainable(tuned.model, {**factors, **changed})
    tuned.model.train()
    data = prepare_data(recipe, tuned, rows, unchanged=False)
    yield tuned, build_loop(recipe, tuned, data, rows, events.Broadcast([]), budget=0)


def _single_rows(loop: Loop) -> list[Batch]:
    """Return every row as a batch of its own."""
    rows = loop.batcher.rows
    return [collate(rows, [[number]], isolate=False) for number in range(len(rows))]


def _step(loop: Loop) -> tuple[float, dict[str, mx.array]]:
    """Return loss and gradients of an epoch in one step."""
    result = loop.stepper.step(loop.batcher.batch(groups) for groups in loop.batcher.plan(0))
    return result.loss, result.gradients


def gradients(place: Place) -> Iterator[Deviation]:
    """Compare a step with the plain one, in float32 on the CPU."""
    for method, name in METHODS.items():
        with _loop(place, method) as (tuned, loop):
            scale = tuned.injected.scale if tuned.injected else 0.0
            plain = PlainModel(tuned.config, tuned.model, scale)
            expected_loss, expected = plain.step(_single_rows(loop), trainable(tuned.model))
            loss, actual = _step(loop)
        relative = abs(loss - expected_loss) / expected_loss
        yield Deviation(f"loss, {name}: = float32 on the CPU", relative, allowed("loss"))
        value, path = largest_difference(actual, expected)
        yield Deviation(
            f"gradients, {name}: = float32 on the CPU", value, allowed("gradient"), where=path
        )


def _same_step(what: str, place: Place, one: JsonObject, other: JsonObject) -> Deviation:
    """Compare loss and gradients of one step that is computed in two ways."""
    with _loop(place, "qlora", **one) as (_, loop):
        loss, actual = _step(loop)
    with _loop(place, "qlora", **other) as (_, loop):
        expected_loss, expected = _step(loop)
    value, path = largest_difference(actual, expected)
    relative = abs(loss - expected_loss) / expected_loss
    if not relative <= value:
        value, path = relative, "loss"
    return Deviation(what, value, allowed("same step"), where=path)


def packed(place: Place) -> Iterator[Deviation]:
    """Compare rows that share a sequence with rows apart."""
    ways = ({"batching": mode, "compile": False} for mode in ("packed", "grouped"))
    yield _same_step("step, rows packed = apart", place, *ways)


def compiled(place: Place) -> Iterator[Deviation]:
    """Compare a compiled step with one that is not."""
    ways = ({"batching": "grouped", "compile": fused} for fused in (True, False))
    yield _same_step("step, compiled = eager", place, *ways)


class _Killed(Exception):
    """Ends a run in the middle of its steps."""


class _KillAfter:
    def __init__(self, step: int) -> None:
        self._step = step

    def notify(self, event: events.Event) -> None:
        """End the run after the step."""
        if isinstance(event, events.StepDone) and event.step == self._step:
            raise _Killed


def _losses(run: Path) -> dict[int, float]:
    records = read_records(run / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if record["event"] == "step"}


def resumed(place: Place) -> Iterator[Deviation]:
    """Compare a run that was ended and resumed with one that was not: losses and weights."""
    recipe = place.recipe("qlora", steps=RESUME_STEPS, save_every=2)
    nobody = events.Broadcast([])
    whole, stopped = (place.folder / name for name in ("whole", "stopped"))
    finetune(recipe, whole, observer=nobody)
    with contextlib.suppress(_Killed):
        finetune(recipe, stopped, observer=_KillAfter(STOP_AFTER))
    finetune(recipe, stopped, observer=nobody, resume=True)
    expected, actual = _losses(whole), _losses(stopped)
    steps = expected.keys() | actual.keys()
    count = sum(expected.get(step) != actual.get(step) for step in steps)
    tensors, others = (
        load_tensors(run / "adapters" / "adapters.safetensors") for run in (whole, stopped)
    )
    count += len(tensors.keys() ^ others.keys())
    count += sum(
        not mx.array_equal(value, others[path]).item()
        for path, value in tensors.items()
        if path in others
    )
    yield Deviation("run, resumed = uninterrupted", float(count), 0.0, "differ")


# -------------------------------------------------------------------------------------- scoring


def quantized(place: Place) -> Iterator[Deviation]:
    """Compare the logits of quantized layers with those of dense float32 ones on the CPU."""
    tokens_BT = mx.array([[(7 * t) % 250 for t in range(96)]])
    for bits in (4, 8):
        loaded = load(place.model, dtype=resolve_dtype("auto"))
        settings = QuantizeConfig(bits=bits, group_size=32)
        config = quantize_model(loaded.model, loaded.config, settings).config
        actual = loaded.model(tokens_BT)  # type: ignore[operator]
        mx.eval(actual)
        with mx.stream(mx.cpu):
            expected = PlainModel(config, loaded.model).logits(tokens_BT)
            mx.eval(expected)
        close = logits_close(actual, expected, Change.SHAPES)
        ratio = close.gap / close.largest
        yield Deviation(f"logits, {bits} bits: = dequantized", ratio, allowed("logits"))


def _requests(seed: int = 0) -> list[Request]:
    """Return continuations of one and of several tokens after contexts that share prefixes."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randint(3, 250) for _ in range(draw.randint(low, high)))

    root, requests = text(40, 40), []
    for number in range(8):
        context = root + text(1, 40)
        endings = [text(1, 1) if number % 3 == 0 else text(1, 10) for _ in range(3)]
        requests += [Request(context + ending, len(context)) for ending in endings]
    return requests


def scorers(place: Place) -> Iterator[Deviation]:
    """Compare the scorers with one plain pass a request."""
    loaded = load(place.model, dtype=resolve_dtype("auto"))
    requests = _requests()
    scores = LoglikelihoodScorer(loaded.model, batch_tokens=256).score(requests)
    gaps = [
        abs(score.loglikelihood - plain_score(loaded.model, request.ids, request.start)[0])
        for score, request in zip(scores, requests, strict=True)
    ]
    yield Deviation("log-likelihoods = plain scorer", _largest(gaps), allowed("nats"), "nats")
    prompts = [list(request.ids) for request in requests[::3]]
    answers = generate_batch(loaded.model, loaded.tokenizer, prompts, NEW_TOKENS, ())
    behind = []
    for prompt, answer in zip(prompts, answers, strict=True):
        # Of two tokens that are as likely rounding decides: how far is the chosen one behind?
        logits_TV = plain_logits(loaded.model, [*prompt, *answer.ids])[len(prompt) - 1 : -1]
        best, chosen = logits_TV.max(-1), logits_TV[np.arange(len(answer.ids)), answer.ids]
        behind.append(float((best - chosen).max() / np.abs(logits_TV).max()))
    yield Deviation("generated tokens = plain scorer", _largest(behind), allowed("logits"))


def _largest(values: list[float]) -> float:
    """Return the largest value, NaN if one is."""
    return math.nan if any(map(math.isnan, values)) else max(values)


# -------------------------------------------------------------------------------- memory, speed


def memory(place: Place) -> Iterator[Deviation]:
    """Compare predicted with measured peaks of real steps, in processes of their own."""
    for method in MEMORY_METHODS:
        values = place.recipe(method).recipe.model_dump(mode="json", exclude_unset=True)
        peaks = run_side("sides", "probe", json.loads(json.dumps(values)))
        ratio = peaks["predicted_peak_bytes"] / peaks["measured_peak_bytes"]
        name = f"peak memory, {method}: predicted = measured"
        yield Deviation(name, abs(ratio - 1), allowed("memory"), where=f"predicted {ratio:.2f} x")
        speed = peaks["computed_tokens"] / peaks["seconds_per_batch"]
        yield Deviation(f"training speed, {method}", speed, None, "tokens/s")


CHECKS: dict[str, Callable[[Place], Iterator[Deviation]]] = {
    "gradients": gradients,
    "packed rows": packed,
    "compiled step": compiled,
    "resume": resumed,
    "quantized layers": quantized,
    "scorers": scorers,
    "memory": memory,
}
