"""Fold an adapter into its model, and check that its effect is retained.

Invariant: weights are summed in float32 and cast last; what is audited is what is stored, rounding
included; one model is in memory: the logits of base and tuned model are recorded, then its layers
are fused one by one. A fuse that loses the tune (``export/fuse_audit.py``: under half of the effect
retained, or no nearer to the tuned model than the base was) is refused and writes nothing,
unless forced. ``fuse.json`` in the output holds the audit. Try it:
``mlx-slim fuse MODEL --adapter runs/mine/adapters -o fused``.

A change of 2% of a 4-bit weight is less than a rounding step: requantizing retains about a seventh
of it. So a quantized base is dequantized by default; ``--keep`` stores the adapter beside it. An
adapter that is constant inside the quantization groups (``adapter.pooled``) is added to the biases:
codes, scales, dtypes and bytes stay.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_slim.adapters.inject import adapters_of, remove_adapters
from mlx_slim.adapters.lora import Adapter
from mlx_slim.adapters.merge import merged_layer
from mlx_slim.adapters.pooled import folded_biases
from mlx_slim.adapters.saved import former_modules, saved_modules
from mlx_slim.adapters.stack import Adapters, Weighted, load_adapters, parse_adapters, used_folders
from mlx_slim.adapters.store import CONFIG, save_adapter
from mlx_slim.artifacts import SCHEMA_VERSION, provenance, public_name, write_json
from mlx_slim.claims import makes_folder
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.events import Notice, Observer
from mlx_slim.export.audit_text import audit_tokens
from mlx_slim.export.fuse_audit import (
    MIN_LOGIT_FRACTION,
    Effect,
    FusingLoses,
    effect,
    weight_retention,
)
from mlx_slim.export.options import FuseOptions, Mode
from mlx_slim.models.lineage import carry
from mlx_slim.models.load import Loaded, cast, read_weights
from mlx_slim.models.quantized import densify, dequantize_weight, is_quantized, use_fast_matmul
from mlx_slim.models.recorded_logits import RecordedLogits
from mlx_slim.models.row_limits import row_limit
from mlx_slim.models.tensors import folder_tensors
from mlx_slim.models.verified_save import compute_dtype, save_checked, stored_dtype
from mlx_slim.quantization.apply import parameter_bytes
from mlx_slim.quantization.base import load_base, recorded_base
from mlx_slim.reading import JsonObject, read_object
from mlx_slim.runtime import (
    DTYPES,
    device_memory,
    dtype_name,
    human_bytes,
    memory_limits,
    on_gpu,
    resolve_dtype,
    to_float,
)

RECORD = "fuse.json"
ADAPTER_FOLDER = "adapters"


@dataclass(frozen=True)
class Fused:
    """A fused model and its audit.

    Attributes:
        path: The folder.
        mode: What was done: ``merge``, ``biases``, ``keep``, ``dequantize`` or ``requantize``.
        layers: Adapted layers.
        saved: Modules trained in full.
        dtype: Of the floating weights.
        bytes: Size of the weights on disk.
        text: Name of the text that was compared on.
        effect: How much of the tune is retained.
        weights_retained: Fraction of the weight change that is left, over all layers.
        least_retained: Path and fraction of the layer that retains least.
        lost: Why the tune counts as lost; empty if it does not.
    """

    path: Path
    mode: str
    layers: int
    saved: int
    dtype: str
    bytes: int
    text: str
    effect: Effect
    weights_retained: float
    least_retained: tuple[str, float]
    lost: str

    def as_record(self) -> JsonObject:
        """Return what ``--json`` prints and ``fuse.json`` holds."""
        return {
            "schema_version": SCHEMA_VERSION,
            "path": self.path.name,
            "mode": self.mode,
            "layers": self.layers,
            "modules_saved": self.saved,
            "dtype": self.dtype,
            "bytes": self.bytes,
            "text": self.text,
            "effect": self.effect.as_record(),
            "weights_kept": self.weights_retained,
            "worst_layer": self.least_retained,
            "lost": self.lost,
        }

    def lines(self) -> list[str]:
        """Return the summary, one fact a line."""
        audit, (path, fraction) = self.effect, self.least_retained
        whole = f" and {self.saved} modules trained in full" * (self.saved > 0)
        lines = [
            f"{self.path}: {self.mode}, {self.layers} layers{whole}, {self.dtype}, "
            f"{human_bytes(self.bytes)}",
            f"audit      {audit.retained:.1%} of the adapter's effect kept, KL {audit.kl:.2g} nats "
            f"from base + adapter (the base: {audit.kl_base:.2g}), same top-1 token "
            f"{audit.top1:.1%} ({audit.tokens:,} tokens of {self.text})",
            f"weights    {self.weights_retained:.1%} of the change kept, least in {path}: "
            f"{fraction:.1%}",
        ]
        if self.mode == "biases":
            lines.append(
                f"lossless   codes and scales as they were; {audit.logit_fraction:.2%} of the "
                "adapter's effect on the logits kept"
            )
            if audit.logit_fraction < MIN_LOGIT_FRACTION:
                lines.append(
                    f"warning: rounding the biases to {self.dtype} loses "
                    f"{1 - audit.logit_fraction:.1%}; --dtype float32 keeps it (5 bits a weight at "
                    "4, and activations in float32), "
                    "and adapter.pooled=true trains with rounded biases"
                )
        if self.lost:
            lines.append(f"warning: the tune is lost: {self.lost}; written because of --force")
        adapter = f" --adapter {self.path / ADAPTER_FOLDER}" if self.mode == "keep" else ""
        lines.append(f"try it     mlx-slim chat {self.path}{adapter}")
        return lines


def find_adapter(folder: Path) -> Path:
    """Return the adapter folder that ``folder`` is, or that its run holds.

    Raises:
        SlimError: If there is none.
    """
    for candidate in (folder, folder / ADAPTER_FOLDER):
        if (candidate / CONFIG).is_file():
            return candidate
    raise SlimError(
        f"{folder} is not an adapter folder: it has no {CONFIG}",
        "give the adapters/ of a run, or a folder that mlx_lm.lora wrote",
    )


@makes_folder("fuse")
@memory_limits()
def fuse(
    source: str | Path,
    adapter: Adapters,
    out: Path,
    options: FuseOptions | None = None,
    observer: Observer | None = None,
) -> Fused:
    """Fold ``adapter`` into ``source`` and write the new folder ``out``.

    Args:
        source: Folder or hub id of the base that the adapter was made for.
        adapter: Adapter folder, ours or mlx-lm's, or the run folder that holds it; of several
            (``DIR`` or ``DIR=WEIGHT``) the weighted sum.
        out: Must not exist.
        options: See ``FuseOptions``.
        observer: Gets a ``Notice`` for each stage.

    Raises:
        ResourceError: If memory or disk are too small.
        SlimError: If the adapter does not fit the base, or the tune is lost; nothing is written.
    """
    options = options or FuseOptions()

    def say(message: str) -> None:
        if observer is not None:
            observer.notify(Notice(message))

    stack = [Weighted(find_adapter(one.folder), one.weight) for one in parse_adapters(adapter)]
    say(f"loading {source}")
    folders = [one.folder for one in stack]
    loaded = load_base(
        source, used_folders(stack), revision=options.revision, dtype=compute_dtype()
    )
    for note in loaded.notes:
        say(note)
    stored = stored_dtype(folder_tensors(loaded.path))
    tokens_NT, text = audit_tokens(
        loaded.tokenizer,
        options.calibration,
        options.samples,
        options.length,
        row_limit(loaded.config),
    )
    model = loaded.model.eval()
    base = RecordedLogits(model, tokens_NT, out)
    injected = load_adapters(model, stack)
    mode = _mode(options.mode, loaded)
    named = recorded_base(used_folders(stack))
    if named is not None and mode not in ("keep", "biases"):  # not what QLoRA computes in
        stored = DTYPES.get(named[1].stored, stored)
    if options.dtype is not None and mode != "keep":
        stored = resolve_dtype(options.dtype)
    tuned = RecordedLogits(model.eval(), tokens_NT, out)
    say(f"folding {len(injected.paths)} layers: {mode}")
    fractions, overall = _fold(model, mode, stored)
    say(f"comparing base, base + adapter and fused model on {tokens_NT.size:,} tokens")
    audit = effect(base, tuned, tuned if mode == "keep" else model, tokens_NT)
    lost = audit.lost()
    if lost and not options.force:
        raise FusingLoses(
            f"fusing would lose the fine-tuning: {lost}; nothing was written", _way_out(mode)
        )

    result = Fused(
        path=out,
        mode=mode,
        layers=len(injected.paths),
        saved=len(injected.saved),
        dtype=dtype_name(stored),
        bytes=0,
        text=text,
        effect=audit,
        weights_retained=overall,
        least_retained=min(fractions.items(), key=lambda item: item[1]),
        lost=lost,
    )
    say(f"saving {out} and reading it back")

    def beside(folder: Path) -> None:
        nonlocal result
        if mode == "keep":
            _keep(folder / ADAPTER_FOLDER, model, stack, str(source))
            carry(folder / ADAPTER_FOLDER, folders)
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        result = replace(result, bytes=size)
        write_json(folder / RECORD, _record(result, source, stack))

    merged = () if mode == "keep" else folders
    save_checked(out, loaded, loaded.config, stored, beside, merged)
    return result


def _keep(folder: Path, model: nn.Module, stack: list[Weighted], base: str) -> None:
    """Write the adapter beside its base: one unchanged, several as their weighted sum."""
    if len(stack) == 1 and stack[0].weight == 1:
        shutil.copytree(stack[0].folder, folder)
        return
    injected = load_adapters(model, stack)
    config = AdapterConfig(rank=round(injected.alpha), scale=injected.scale)
    save_adapter(folder, model, config, injected, dora=False, base=base)


def _mode(mode: Mode, loaded: Loaded) -> str:
    quantized = is_quantized(loaded.model)
    if mode == "requantize" and not quantized:
        raise SlimError(
            f"{loaded.source} is not quantized: there is no format to quantize it back to",
            "fuse it without --requantize, then: mlx-slim quantize FUSED -o DIR",
        )
    if mode in ("keep", "dequantize") or (quantized and mode == "requantize"):
        return mode if quantized or mode == "keep" else "merge"
    if all(folded_biases(adapter) is not None for _, adapter in adapters_of(loaded.model)):
        return "biases"
    return "dequantize" if quantized else "merge"


def _way_out(mode: str) -> str:
    if mode == "requantize":
        return "use --dequantize or --keep, or --force to write it anyway"
    if mode == "biases":
        return "use --dtype float32, --dequantize or --keep, or --force to write it anyway"
    return "use --dtype float32 or --keep, or --force to write it anyway"


def _fold(model: nn.Module, mode: str, stored: mx.Dtype) -> tuple[dict[str, float], float]:
    """Fuse ``model`` in place, as it will be stored, in the dtype that models compute in.

    Returns:
        The fraction of each layer's change that is left, and that over all layers.
    """
    compute = compute_dtype()
    wide = compute is not None or mode == "requantize"
    _check_memory(model, mode, 4 if wide else stored.size)
    fractions: dict[str, float] = {}
    sizes: dict[str, float] = {}
    waiting = adapters_of(model)[::-1]
    while waiting:  # popped, so that each former layer is freed as soon as it is replaced
        path, adapter = waiting.pop()
        base, merged = dequantize_weight(adapter.base), adapter.merged_weight()
        now = merged
        if mode != "keep":
            if mode == "biases":
                layer = _with_biases(adapter)
            else:
                layer = merged_layer(adapter, mx.float32 if wide else stored)
            if mode == "requantize":
                layer = _requantized(layer, adapter.base)
            for dtype in filter(None, (stored, compute)):
                cast(layer, dtype)
                read_weights(layer)
            model.update_modules(tree_unflatten([(path, layer)]))
            now = dequantize_weight(layer)
        sizes[path] = to_float(mx.square(merged - base).sum())
        fractions |= weight_retention([(path, base, merged, now)])
    if mode == "keep":
        remove_adapters(model)
    else:
        if mode == "requantize":
            for path, former in former_modules(model).items():
                layer = _requantized(saved_modules(model)[path], former)
                model.update_modules(tree_unflatten([(path, layer)]))
        if mode == "dequantize":
            densify(model, None if wide else stored)  # on a GPU a float32 model is a second one
        for dtype in filter(None, (stored, compute)):
            cast(model, dtype)
            read_weights(model)
        use_fast_matmul(model)
    model.freeze()
    total = sum(sizes.values())
    along = sum(fractions[path] * sizes[path] for path in fractions)
    return fractions, along / total if total > 0 else 1.0


def _check_memory(model: nn.Module, mode: str, itemsize: int) -> None:
    """Refuse to start where a dense layer, or the growth of the model, does not fit beside it."""
    layers = {path: adapter.base for path, adapter in adapters_of(model)}
    if mode == "dequantize":
        layers |= {path: each for path, each in model.named_modules() if "scales" in each}
    dense = {id(each): itemsize * _dense_size(each) for each in layers.values()}
    grown = {id(each): dense[id(each)] - parameter_bytes(each) for each in layers.values()}
    needed = max(dense.values()) + (sum(grown.values()) if mode == "dequantize" else 0)
    free = device_memory() - (mx.get_active_memory() if on_gpu() else 0)
    if mode != "keep" and needed > free:
        raise ResourceError(
            f"fusing needs {human_bytes(needed)} more than the base, {human_bytes(free)} are free",
            "close other programs, or use --keep, which dequantizes no layers",
        )


def _dense_size(layer: Any) -> int:
    """Return the numbers of the weight of a linear layer or embedding, quantized or not."""
    return layer["scales"].size * layer.group_size if "scales" in layer else layer["weight"].size


def _with_biases(adapter: Adapter) -> nn.Module:
    """Return the base layer of ``adapter`` with biases that hold its update, float32."""
    layer = copy.copy(adapter.base)  # codes and scales are the same arrays
    layer["biases"] = folded_biases(adapter)
    return layer


def _requantized(dense: Any, former: Any) -> nn.Module:
    """Return ``dense`` in the format of ``former``, if that was quantized."""
    if "scales" not in former:
        return dense
    layer = dense.to_quantized(group_size=former.group_size, bits=former.bits, mode=former.mode)
    mx.eval(layer.parameters())
    use_fast_matmul(layer)
    return layer


def _record(result: Fused, source: str | Path, stack: list[Weighted]) -> JsonObject:
    described = [_described(one) for one in stack]
    return {
        **result.as_record(),
        "base": public_name(source),
        "adapter": described[0],
        **({"adapters": described} if len(described) > 1 else {}),
        "provenance": provenance(),
    }


def _described(one: Weighted) -> JsonObject:
    settings = read_object(one.folder / CONFIG)
    keys = ("fine_tune_type", "lora_parameters", "trained_with", "model")
    if settings.get("model"):
        settings["model"] = public_name(settings["model"])
    described = {key: settings[key] for key in keys if key in settings}
    return described if one.weight == 1 else {**described, "weight": one.weight}
