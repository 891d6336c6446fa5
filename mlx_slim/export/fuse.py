"""Fold an adapter into its model, and check that its effect is retained.

Invariant: weights are summed in float32 and cast last; what is audited is what is stored, rounding
included; base, tuned and fused model are read a block at a time, one after the other, and the
logits of the first two are recorded. A fuse that loses the tune (``export/fuse_audit.py``: under
half of the effect retained, or no nearer to the tuned model than the base was) is refused and
writes nothing, unless forced. ``fuse.json`` in the output holds the audit. Try it:
``mlx-slim fuse MODEL --adapter runs/mine/adapters -o fused``.

A change of 2% of a 4-bit weight is less than a rounding step: requantizing retains about a seventh
of it. So a quantized base is dequantized by default; ``--keep`` stores the adapter beside it. An
adapter that is constant inside the quantization groups (``adapter.pooled``) is added to the biases:
codes, scales, dtypes and bytes stay.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.nn as nn

from mlx_slim.adapters.inject import adapters_of
from mlx_slim.adapters.pooled import folded_biases
from mlx_slim.adapters.stack import Adapters, Weighted, load_adapters, parse_adapters, used_folders
from mlx_slim.adapters.store import CONFIG, save_adapter
from mlx_slim.artifacts import SCHEMA_VERSION, provenance, public_name, write_json
from mlx_slim.claims import makes_folder
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import SlimError
from mlx_slim.events import Notice, Observer
from mlx_slim.export.audit_text import audit_tokens
from mlx_slim.export.folding import fold, retention, with_adapters
from mlx_slim.export.fuse_audit import MIN_LOGIT_FRACTION, Effect, FusingLoses, effect
from mlx_slim.export.options import FuseOptions, Mode
from mlx_slim.models.fidelity import Model
from mlx_slim.models.lineage import carry
from mlx_slim.models.quantized import is_quantized
from mlx_slim.models.recorded_logits import RecordedLogits
from mlx_slim.models.row_limits import row_limit
from mlx_slim.models.streamed import answers_of, rounded
from mlx_slim.models.tensors import folder_tensors
from mlx_slim.models.verified_save import compute_dtype, save_checked, stored_dtype
from mlx_slim.quantization.base import recorded_base, unread_base
from mlx_slim.reading import JsonObject, read_object
from mlx_slim.runtime import DTYPES, dtype_name, memory_limits, resolve_dtype
from mlx_slim.units import human_bytes

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
    loaded = unread_base(source, used_folders(stack), revision=options.revision)
    computed = replace(loaded, open=rounded(loaded.open, compute_dtype()))
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
    adapted, injected = with_adapters(loaded, stack)
    mode = _mode(options.mode, adapted, loaded.source)
    del adapted
    named = recorded_base(used_folders(stack))
    if named is not None and mode not in ("keep", "biases"):  # not what QLoRA computes in
        stored = DTYPES.get(named[1].stored, stored)
    if options.dtype is not None and mode != "keep":
        stored = resolve_dtype(options.dtype)

    def tuned_model() -> nn.Module:
        return with_adapters(computed, stack)[0]

    def fused_model() -> nn.Module:
        return fold(with_adapters(loaded, stack)[0], mode, stored)

    base = RecordedLogits(answers_of(computed.open, tokens_NT, "reading the base"), tokens_NT, out)
    tuned = RecordedLogits(
        answers_of(tuned_model, tokens_NT, "reading base + adapter"), tokens_NT, out
    )
    say(f"folding {len(injected.paths)} layers: {mode}")
    keep = mode == "keep"
    stores = None if keep else rounded(fused_model, stored, compute_dtype())
    fractions, overall = retention(tuned_model, stores)
    result: Fused | None = None

    def judge(fused: Model) -> None:
        nonlocal result
        say(f"comparing base, base + adapter and fused model on {tokens_NT.size:,} tokens")
        audit = effect(base, tuned, tuned if keep else fused, tokens_NT)
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
        if keep:
            _keep(folder / ADAPTER_FOLDER, computed.open(), stack, str(source))
            carry(folder / ADAPTER_FOLDER, folders)
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        assert result is not None
        result = replace(result, bytes=size)
        write_json(folder / RECORD, _record(result, source, stack))

    stored_model = loaded if keep else replace(loaded, open=fused_model)
    merged = () if keep else folders
    save_checked(
        out, stored_model, loaded.config, stored, beside, merged, judged_NT=tokens_NT, judge=judge
    )
    assert result is not None
    return result


def _keep(folder: Path, model: nn.Module, stack: list[Weighted], base: str) -> None:
    """Write the adapter beside its base: one unchanged, several as their weighted sum."""
    if len(stack) == 1 and stack[0].weight == 1:
        shutil.copytree(stack[0].folder, folder)
        return
    injected = load_adapters(model, stack)
    config = AdapterConfig(rank=round(injected.alpha), scale=injected.scale)
    save_adapter(folder, model, config, injected, dora=False, base=base)


def _mode(mode: Mode, adapted: nn.Module, source: str) -> str:
    quantized = is_quantized(adapted)
    if mode == "requantize" and not quantized:
        raise SlimError(
            f"{source} is not quantized: there is no format to quantize it back to",
            "fuse it without --requantize, then: mlx-slim quantize FUSED -o DIR",
        )
    if mode in ("keep", "dequantize") or (quantized and mode == "requantize"):
        return mode if quantized or mode == "keep" else "merge"
    if all(folded_biases(adapter) is not None for _, adapter in adapters_of(adapted)):
        return "biases"
    return "dequantize" if quantized else "merge"


def _way_out(mode: str) -> str:
    if mode == "requantize":
        return "use --dequantize or --keep, or --force to write it anyway"
    if mode == "biases":
        return "use --dtype float32, --dequantize or --keep, or --force to write it anyway"
    return "use --dtype float32 or --keep, or --force to write it anyway"


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
