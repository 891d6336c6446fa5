"""What works for one model type: a small random model, and a check for each capability.

Invariant: each check runs what the command runs, from the folder of a model to the artifact that is
read back, and compares numbers; what does not work is the line that the command prints. Run as a
module, it is the child of ``bench/models.py``: jobs in, a line of JSON for each cell out. Try it:
``mlx-slim bench models --type qwen3``.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_slim.adapters.inject import adapters_of, inject
from mlx_slim.adapters.stack import load_adapters, parse_adapters
from mlx_slim.adapters.store import save_adapter
from mlx_slim.bench.model_case import TEXT, ModelCase, build_case
from mlx_slim.bench.models import COLUMNS, NOT_SMALL, OK
from mlx_slim.config.load import from_values
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.scoring.loglikelihood import LoglikelihoodScorer
from mlx_slim.evaluation.scoring.plain import plain_score
from mlx_slim.evaluation.scoring.requests import Request
from mlx_slim.events import Event, StepDone
from mlx_slim.export.fuse import fuse
from mlx_slim.export.model import export_gguf
from mlx_slim.export.options import FuseOptions
from mlx_slim.finetuning.build import full_logits_notice
from mlx_slim.finetuning.run import finetune
from mlx_slim.models import structure
from mlx_slim.models.convert import convert
from mlx_slim.models.gguf.load import ARCHITECTURES
from mlx_slim.models.load import load, read_config
from mlx_slim.models.mixtures import mixture_of
from mlx_slim.models.quantized import densify
from mlx_slim.pruning.options import PruneOptions
from mlx_slim.pruning.run import prune
from mlx_slim.quantization.options import CompressOptions
from mlx_slim.quantization.policy import quantize_config
from mlx_slim.quantization.run import compress

_STEPS = 4
_INTERNAL = "internal error: "
_TOLERANCE = 2e-3  # of logits and losses in float32, relative to the largest


class _Differs(Exception):
    """A check that did not hold: a fault of ours or of the model class."""


# ------------------------------------------------------------------------------------- comparing


def _logits(model: Any, cache: Any = None) -> mx.array:
    """Return float32 logits (1, T, V) on token ids below 256, -inf left out."""
    logits = model(mx.arange(40)[None] * 7 % 256, cache=cache).astype(mx.float32)
    return mx.where(mx.isinf(logits) & (logits < 0), 0.0, logits)


def _check_close(one: mx.array, other: mx.array, what: str, tolerance: float = _TOLERANCE) -> None:
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    scale = max(float(mx.abs(other).max()), 1e-6)  # type: ignore[arg-type]
    gap = float(mx.abs(one - other).max()) / scale  # type: ignore[arg-type]
    if not gap <= tolerance:
        raise _Differs(f"{what} differ by {gap:.1g} of the largest")


class _Steps:
    """An observer that keeps steps."""

    def __init__(self) -> None:
        self.steps: list[StepDone] = []

    def notify(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.steps.append(event)


def _train(case: ModelCase, method: str, **train: Any) -> _Steps:
    """Run ``mlx-slim train`` on the rows; one step is one pass over them."""
    values = {
        "model": str(case.model),
        "method": method,
        "adapter": {"rank": 4},
        "data": {"path": str(case.folder / "rows.jsonl"), "validation": 0},
        "report_answers": 0,
        "train": {
            "steps": _STEPS,
            "batch_tokens": 512,
            "max_length": 128,
            "learning_rate": 5e-3,
            "batching": "grouped",
            **train,
        },
    }
    if method == "qlora":
        values["quantize"] = {"group_size": 32}
    observer = _Steps()
    finetune(from_values(values, "bench models", "bench models"), case.new(), observer=observer)
    return observer


def _check_learns(steps: Sequence[StepDone]) -> None:
    numbers = [(step.loss, step.grad_norm) for step in steps]
    if not all(math.isfinite(loss) and 0 < norm < math.inf for loss, norm in numbers):
        raise _Differs(f"loss or gradient is 0 or not finite: {numbers[0]}")
    if not min(step.loss for step in steps[1:]) < steps[0].loss:
        raise _Differs("the loss does not fall")


# ---------------------------------------------------------------------------------------- checks


def _load(case: ModelCase) -> None:
    loaded = load(case.model)
    stock: Any
    if any("mlx-lm by itself" in note for note in loaded.notes):
        stock = loaded.model
    else:
        stock = load_model(case.model)[0]
    cached = _logits(stock, make_prompt_cache(stock))
    _check_close(_logits(loaded.model), cached, "our logits and mlx-lm's with a cache")


def _trains(method: str) -> Callable[[ModelCase], None]:
    return lambda case: _check_learns(_train(case, method).steps)


def _full(case: ModelCase) -> None:
    steps = _train(case, "full").steps
    _check_learns(steps)
    case.separate = steps[0]


def _packed(case: ModelCase) -> None:
    packed = _train(case, "full", batching="packed", steps=1).steps[0]
    separate = case.separate or _train(case, "full", steps=1).steps[0]
    for one, other, what in (
        (packed.loss, separate.loss, "losses"),
        (packed.grad_norm, separate.grad_norm, "gradients"),
    ):
        _check_close(mx.array(one), mx.array(other), f"{what} of packed and separate rows")


def _split_head(case: ModelCase) -> None:
    loaded = load(case.model)
    if structure.split(loaded.model, loaded.config.get("vocab_size", 8)) is None:
        raise SlimError(full_logits_notice(loaded.config))


def _requests() -> list[Request]:
    root = [int(byte) for byte in TEXT.encode()[:24]]
    return [
        Request((*root, *context, *answer), len(root) + len(context))
        for context in ([10, 20, 30, 40, 50], [11, 21, 31])
        for answer in ([65, 66], [67], [65, 68, 69, 70])
    ]


def _scored(case: ModelCase) -> LoglikelihoodScorer:
    model = load(case.model).model
    scorer = LoglikelihoodScorer(model)
    requests = _requests()
    scores = scorer.score(requests, root=requests[0].ids[:24])
    plain = [plain_score(model, request.ids, request.start)[0] for request in requests]
    _check_close(
        mx.array([score.loglikelihood for score in scores]),
        mx.array(np.array(plain, dtype=np.float32)),
        "scores and those of plain passes",
    )
    return scorer


def _eval(case: ModelCase) -> None:
    _scored(case)


def _shared(case: ModelCase) -> None:
    scorer = _scored(case)
    if not scorer.sharing:
        raise SlimError(next(note for note in scorer.notes if "shared" in note))


def _quantize(case: ModelCase) -> None:
    out = case.new()
    done = compress(
        case.model, out, CompressOptions(quantize=quantize_config(4, 32), fidelity_samples=0)
    )
    if not sum(done.report.quantized.values()):
        raise _Differs("no layer was quantized")
    quantized, dense = load(out).model, load(out).model
    densify(dense)
    _check_close(_logits(quantized), _logits(dense), "logits of quantized and dequantized layers")


def _prune(case: ModelCase, options: PruneOptions) -> None:
    out = case.new()
    text = case.text()
    settings = replace(options, calibration=text, samples=2, length=32, held_out=64)
    done = prune(case.model, out, settings)
    if not done.details.parameters_after < done.details.parameters_before:
        raise _Differs("nothing was removed")
    if not bool(mx.isfinite(_logits(load(out).model)).all()):
        raise _Differs("the pruned model's logits are not finite")


def _depth(case: ModelCase) -> None:
    _prune(case, PruneOptions(axis="depth", ratio=0.25))


def _width(case: ModelCase) -> None:
    if mixture_of(read_config(case.model)) is not None:
        _prune(case, PruneOptions(method="reap", ratio=0.5))
    else:
        _prune(case, PruneOptions(axis="width", ratio=0.5))


def _fuse(case: ModelCase) -> None:
    adapter, out = case.new(), case.new()
    loaded = load(case.model)
    settings = AdapterConfig(rank=4)
    mx.random.seed(1)
    injected = inject(loaded.model, settings, dora=False)
    for _, layer in adapters_of(loaded.model):
        layer["lora_b"] = 0.05 * mx.random.normal(layer["lora_b"].shape)
    save_adapter(adapter, loaded.model, settings, injected, dora=False, base=str(case.model))
    fuse(case.model, str(adapter), out, FuseOptions(calibration=case.text(), samples=1, length=32))
    tuned = load(case.model).model
    load_adapters(tuned, parse_adapters(str(adapter)))
    _check_close(_logits(load(out).model), _logits(tuned), "logits of fused and base + adapter")


def _gguf_out(case: ModelCase) -> None:
    out = case.new()
    export_gguf(case.model, out, calibration=case.text())
    case.exported = next(out.glob("*.gguf"))


def _gguf_in(case: ModelCase) -> None:
    if case.exported is None:
        try:
            _gguf_out(case)
        except SlimError:
            _foreign_gguf(case)
    assert case.exported is not None
    out = case.new()
    convert(str(case.exported), out)
    again, model = load(out, dtype=mx.float32).model, load(case.model).model
    _check_close(_logits(again), _logits(model), "logits of the model and of its F16 file", 0.03)


def _foreign_gguf(case: ModelCase) -> None:
    """Write the head of a GGUF file of this type: what refuses it is the reader."""
    from gguf import GGUFWriter

    if case.model_type in {*ARCHITECTURES, *(one.model_type for one in ARCHITECTURES.values())}:
        raise SlimError("read, but not written: there is no file here to read back")
    file = case.folder / "foreign.gguf"
    writer = GGUFWriter(str(file), case.model_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    case.exported = file


_CHECKS: dict[str, Callable[[ModelCase], None]] = {
    "load": _load,
    "LoRA": _trains("lora"),
    "QLoRA": _trains("qlora"),
    "full": _full,
    "packed": _packed,
    "split head": _split_head,
    "eval": _eval,
    "shared prefixes": _shared,
    "quantize": _quantize,
    "prune depth": _depth,
    "prune width": _width,
    "fuse": _fuse,
    "GGUF out": _gguf_out,
    "GGUF in": _gguf_in,
}


def cells(model_type: str, columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (column, cell) of one model type, in the order of ``columns``.

    A cell is ``ok``, the line that the command prints, or ``does not build small`` with the reason.
    """
    folder = Path(tempfile.mkdtemp(prefix="mlx-slim-models-"))
    try:
        try:
            case = build_case(model_type, folder)
        except Exception as error:
            reason = f"{NOT_SMALL}: {_line(error, folder).removeprefix(_INTERNAL)}"
            yield from ((column, reason) for column in columns)
            return
        for column in columns:
            yield column, _cell(_CHECKS[column], case)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cell(check: Callable[[ModelCase], None], case: ModelCase) -> str:
    try:
        check(case)
    except _Differs as wrong:
        return f"wrong: {wrong}"
    except Exception as error:
        return _line(error, case.folder)
    finally:
        mx.clear_cache()
    return OK


def _line(error: Exception, folder: Path) -> str:
    """Return what the command prints of an error, without the path of the temporary folder."""
    message = error.message if isinstance(error, SlimError) else f"{type(error).__name__}: {error}"
    text = " ".join(message.split()).replace(f"{folder}/", "").replace(str(folder), "")
    return text if isinstance(error, SlimError) else f"{_INTERNAL}{text[:200]}"


def main() -> None:
    """Compute the jobs of ``sys.argv[1]``, a JSON list of [model type, columns]."""
    results = os.fdopen(os.dup(1), "w")  # what libraries print goes elsewhere
    os.dup2(2, 1)
    assert tuple(_CHECKS) == COLUMNS
    for model_type, columns in json.loads(sys.argv[1]):
        for column, cell in cells(model_type, columns):
            print(json.dumps([model_type, column, cell]), file=results, flush=True)


if __name__ == "__main__":
    main()
