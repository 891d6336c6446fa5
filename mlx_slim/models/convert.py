"""Any source becomes an MLX folder that is checked before it is announced.

Invariant: the output exists only if, loaded again from disk, it gives the logits of the source (bit
for bit where the stored dtype is the source's, within the rounding of the new dtype otherwise), and
its tokenizer the same ids, texts and template. Try it:
``mlx-slim convert HuggingFaceTB/SmolLM2-135M-Instruct -o smollm2``.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim.artifacts import atomic_folder
from mlx_slim.claims import makes_folder
from mlx_slim.errors import SlimError
from mlx_slim.models.activations import use_fast_swiglu
from mlx_slim.models.gguf.load import import_gguf
from mlx_slim.models.load import load
from mlx_slim.models.logits import kl_divergence
from mlx_slim.models.opening import cast, read_weights
from mlx_slim.models.options import ConvertOptions
from mlx_slim.models.quantized import densify, is_quantized, use_fast_matmul
from mlx_slim.models.save import save_model, saved_config
from mlx_slim.models.tokenizer import description
from mlx_slim.reading import JsonObject, ModelConfig, shown
from mlx_slim.runtime import dtype_name, to_float

# Largest KL divergence (nats a token) between source and output: rounding to bfloat16 costs 0.01 on
# SmolLM2-135M, a wrong tensor whole nats.
_MAX_KL = 0.1
_MAX_KL_SAME = 1e-6
_PROBE = 16


@dataclass(frozen=True)
class ConvertReport:
    """What was written and how far it is from the source.

    Attributes:
        path: The MLX folder.
        tensors: Number of tensors written.
        parameters: Number of weights, codes counted as one each.
        bytes: Size of the weights.
        bits_per_weight: Scales and biases of quantized layers included.
        dtype: Of most floating weights.
        kl: KL(source ‖ output) of the reloaded folder, nats a token on the probe tokens.
        exact: Whether the probe logits were equal bit for bit.
        notes: What was changed or assumed on the way.
    """

    path: Path
    tensors: int
    parameters: int
    bytes: int
    bits_per_weight: float
    dtype: str
    kl: float
    exact: bool
    notes: list[str]


@makes_folder("convert")
def convert(
    source: str | Path,
    out: Path,
    *,
    dtype: mx.Dtype | None = None,
    dequantize: bool = ConvertOptions.dequantize,
    revision: str | None = ConvertOptions.revision,
    trust_remote_code: bool = ConvertOptions.trust_remote_code,
) -> ConvertReport:
    """Convert a hub id, a Hugging Face folder or a ``.gguf`` file to an MLX folder.

    Args:
        source: What to convert.
        out: The folder to write; must not exist.
        dtype: Cast floating weights to it; quantized codes stay, their scales follow.
        dequantize: Write dense weights instead of quantized codes.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run Python files that the repository brings.

    Raises:
        SlimError: If the source cannot be used, ``out`` exists, or the written folder does not give
            the source's logits and token ids (nothing is left behind then).
        ResourceError: If the disk is too small.
    """
    # Built beside the output and moved into place only after the check.
    with atomic_folder(out) as temporary:
        staged = temporary / "model"
        result = _write(source, staged, dtype, dequantize, revision, trust_remote_code)
        mx.clear_cache()  # the source is gone: two models never share the memory
        again = load(staged, trust_remote_code=trust_remote_code)
        kl, exact = _compare(result.logits_LV, _probe(again.model, again.config))
        reloaded = description(again.tokenizer)
        for name, value in result.tokenizer.items():
            if reloaded[name] != value:
                raise SlimError(
                    f"the converted tokenizer differs from that of {source}: the {name} is "
                    f"{shown(reloaded[name])}, there {shown(value)}",
                    "nothing was written; please report it",
                )
        limit = _MAX_KL_SAME if result.same_dtypes else _MAX_KL
        if not (exact or kl <= limit):
            raise SlimError(
                f"the converted model differs from {source}: KL {kl:.3g} nats a token, expected "
                f"at most {limit:g}",
                "nothing was written; try --dtype float32",
            )
        for file in staged.iterdir():
            shutil.move(file, temporary / file.name)
        staged.rmdir()
    return _report(out, again.model, again.config, kl, exact, result.notes)


@dataclass(frozen=True)
class _Conversion:
    """What remains of the source once its model is freed."""

    logits_LV: mx.array
    tokenizer: JsonObject
    same_dtypes: bool
    notes: list[str]


def _write(
    source: str | Path,
    folder: Path,
    dtype: mx.Dtype | None,
    dequantize: bool,
    revision: str | None,
    trust: bool,
) -> _Conversion:
    tokenizer: Any
    if str(source).lower().endswith(".gguf"):
        imported = import_gguf(Path(source).expanduser())
        model, tokenizer, config = imported.model, imported.tokenizer, imported.config
        notes, code_from = list(imported.notes), None
        use_fast_matmul(model)
        use_fast_swiglu(model)
    else:
        loaded = load(source, revision=revision, trust_remote_code=trust)
        model, tokenizer, config = loaded.model, loaded.tokenizer, loaded.config
        notes, code_from = list(loaded.notes), loaded.path
    logits_LV = _probe(model, config)
    before = {path: value.dtype for path, value in _parameters(model).items()}
    if dequantize and is_quantized(model):
        densify(model, dtype or mx.float16)
        notes.append(f"quantized layers dequantized to {dtype_name(dtype or mx.float16)}")
    if dtype is not None:
        cast(model, dtype)
        read_weights(model)
    same = before == {path: value.dtype for path, value in _parameters(model).items()}
    save_model(folder, model, tokenizer, config, code_from=code_from)
    return _Conversion(logits_LV, description(tokenizer), same, notes)


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    return tree_flatten(model.parameters(), destination={})  # type: ignore[return-value]


def _report(
    out: Path, model: nn.Module, config: ModelConfig, kl: float, exact: bool, notes: list[str]
) -> ConvertReport:
    from mlx_lm.utils import compute_bits_per_weight, get_total_parameters

    parameters = _parameters(model)
    return ConvertReport(
        path=out,
        tensors=len(parameters),
        parameters=get_total_parameters(model),
        bytes=sum(value.nbytes for value in parameters.values()),
        bits_per_weight=compute_bits_per_weight(model),
        dtype=saved_config(model, config)["dtype"],
        kl=kl,
        exact=exact,
        notes=notes,
    )


def _probe(model: nn.Module, config: ModelConfig) -> mx.array:
    """Return float32 logits (L, V) on a few token ids spread over the vocabulary."""
    text = config.get("text_config")
    vocab = int(config.get("vocab_size") or (text or {}).get("vocab_size") or 256)
    ids = mx.array([[(7919 * i + 11) % vocab for i in range(_PROBE)]])
    logits = model(ids)[0].astype(mx.float32)
    mx.eval(logits)
    return logits


def _compare(expected_LV: mx.array, converted_LV: mx.array) -> tuple[float, bool]:
    """Return KL(expected ‖ found) in nats a token, and whether the logits are equal."""
    exact = bool(mx.array_equal(expected_LV, converted_LV, equal_nan=True).item())
    kl = to_float(kl_divergence(expected_LV, converted_LV).mean())
    return (0.0 if exact else abs(kl)), exact
