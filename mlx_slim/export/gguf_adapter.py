"""Export of adapters to llama.cpp: a GGUF file beside the GGUF file of its base.

Invariant: the factors stand under the names and in the row order that the base has in GGUF, so
that llama.cpp's base + (alpha / rank) · BA is what is computed here; the file is read back by the
tables of the importer and compared bit for bit before it appears. Only shapes of the base and a few
of its numbers are read, never all of its weights. What llama.cpp cannot add (DoRA, an embedding
that is the head too) is refused. Try it: ``mlx-slim export runs/mine --to gguf-adapter -o gguf``,
then ``llama-cli -m BASE.gguf --lora gguf/mine-lora.gguf -p Hello``.

Shapes: I inputs, O outputs, E experts, V vocabulary, D width, R rank.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_slim.adapters.inject import adapters_of
from mlx_slim.adapters.lora import Adapter, LoRAEmbedding, is_experts
from mlx_slim.adapters.store import CONFIG, load_adapter
from mlx_slim.artifacts import atomic_folder, public_name
from mlx_slim.claims import makes_folder
from mlx_slim.errors import SlimError
from mlx_slim.events import Observer
from mlx_slim.export.card import Card, describe
from mlx_slim.export.fuse import ADAPTER_FOLDER, find_adapter
from mlx_slim.export.model import Exported, add_versions, stage_notifier
from mlx_slim.export.options import GgufAdapterOptions
from mlx_slim.export.peft import base_errors, base_of
from mlx_slim.models.build import refuse_unnamed, refuse_varied
from mlx_slim.models.gguf.architectures import BY_MODEL_TYPE, Architecture, inner_path
from mlx_slim.models.gguf.file import read_gguf
from mlx_slim.models.hub import resolve
from mlx_slim.models.opening import open_weights
from mlx_slim.models.tensors import few
from mlx_slim.reading import ModelConfig, field, read_object
from mlx_slim.units import human_bytes

Tensors = dict[str, np.ndarray]


@makes_folder("export --to gguf-adapter")
def export_gguf_adapter(
    source: Path,
    out: Path,
    *,
    base: str | None = GgufAdapterOptions.base,
    observer: Observer | None = None,
) -> Exported:
    """Write an adapter folder as a GGUF adapter with a card beside it.

    Args:
        source: Adapter folder, ours or mlx-lm's, or the run that holds it.
        out: The folder; must not exist.
        base: Folder or hub id of the base; None takes the one that the adapter names.
        observer: Gets a ``Notice`` for each stage.

    Raises:
        SlimError: If the adapter does not fit the base, llama.cpp cannot represent it, or what is
            read back differs; nothing is written.
    """
    say = stage_notifier(observer)
    if out.suffix == ".gguf":
        raise SlimError(
            f"{out} names a file: the output is a folder (GGUF, card)",
            f"use -o {out.with_suffix('')}",
        )
    source = find_adapter(source)
    settings = read_object(source / CONFIG)
    if settings.get("fine_tune_type") == "dora":
        raise SlimError(
            f"{source} is a DoRA, which llama.cpp has no adapters for",
            "fuse it (mlx-slim fuse) and export the model: --to gguf",
        )
    place = base_of(source, field(settings, str(source / CONFIG), "model", str, None), base)
    say(f"reading the shapes of {place}")
    with base_errors(source, base is not None):
        model, config, _ = open_weights(resolve(place))
    refuse_varied(config, "GGUF")
    refuse_unnamed(config, BY_MODEL_TYPE, "GGUF adapters", "or fuse it and use --to hf")
    architecture = BY_MODEL_TYPE[config["model_type"]]
    injected = load_adapter(model, source)
    if injected.saved:
        raise SlimError(
            f"{source} holds {few(injected.saved)} trained in full, and llama.cpp's adapters hold "
            "no such modules",
            "fuse it (mlx-slim fuse) and export the model: --to gguf",
        )
    if injected.scale == 0:  # llama.cpp takes an alpha of 0 for a scale of 1
        raise SlimError(f"{source} has the scale 0: it changes nothing", "no export is needed")
    adapters = adapters_of(model)
    rank = adapters[0][1].stored_rank
    tied = not any(path.endswith("lm_head") for path, _ in model.named_modules())
    tensors = _tensors(adapters, architecture, config, tied)
    name = _name(source)
    file = f"{name}-lora.gguf"
    with atomic_folder(out) as temporary:
        _write(temporary / file, tensors, architecture, injected.scale * rank, name)
        _check(temporary / file, adapters, architecture, config)
        usage = f"llama-cli -m BASE.gguf --lora {file} -p 'Hello'"
        card = Card(
            title=f"LoRA adapter for {public_name(place)}, GGUF",
            base=place,
            library="gguf",
            what="A LoRA adapter for llama.cpp, to be used with the GGUF file of its base, written "
            "by mlx-slim.",
            usage=[usage],
        )
        describe(source, card)
        add_versions(card)
        card.write(temporary)
    size = (out / file).stat().st_size
    facts = [
        f"{out / file}: LoRA over {len(injected.paths)} layers, rank {rank}, alpha "
        f"{injected.scale * rank:g}, F32, {human_bytes(size)}",
        "checked    read back, every factor equal",
    ]
    if "quantization" in config or settings.get("quantized_base"):
        facts.insert(
            1,
            "note       it was trained over a quantized base: over a GGUF file that is rounded "
            "otherwise it answers a little differently",
        )
    command = f"llama-cli -m BASE.gguf --lora {shlex.quote(str(out / file))} -p 'Hello'"
    return Exported(out, facts, [command])


def _name(source: Path) -> str:
    """Return the name of the run or folder, as a file may be called."""
    folder = source.resolve()
    folder = folder.parent if folder.name == ADAPTER_FOLDER else folder
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name) or "adapter"


def _factors(adapter: Adapter) -> tuple[np.ndarray, np.ndarray]:
    """Return (A, B), float32, as llama.cpp multiplies them.

    A (R, I) and B (O, R) of a linear layer, (E, R, I) and (E, O, R) of experts; of an embedding A
    (V, R), whose rows are looked up, and B (D, R).
    """
    a, b = (np.array(factor.astype(mx.float32)) for factor in adapter.factors())
    if is_experts(adapter.base):
        return a, b
    return (a if isinstance(adapter, LoRAEmbedding) else a.T), b.T


def _tensors(
    adapters: list[tuple[str, Adapter]],
    architecture: Architecture,
    config: ModelConfig,
    tied: bool,
) -> Tensors:
    tensors: Tensors = {}
    names = {path: architecture.tensor_of(path) for path, _ in adapters}
    if unnamed := [path for path, name in names.items() if name is None]:
        raise SlimError(
            f"{len(unnamed)} adapted layers of this {config['model_type']} model have no place of "
            f"their own in GGUF: {few(unnamed)}",
            "fuse the adapter (mlx-slim fuse) and export the model",
        )
    for path, adapter in adapters:
        if isinstance(adapter, LoRAEmbedding) and tied:
            raise SlimError(
                f"{path} is adapted and is the head of this model too: llama.cpp adds an adapter "
                "to one of them only",
                "fuse the adapter (mlx-slim fuse) and export the model: --to gguf",
            )
        a, b = _factors(adapter)
        b = architecture.to_gguf(b, path, "lora_b", config)
        tensors[f"{names[path]}.weight.lora_a"] = np.ascontiguousarray(a)
        tensors[f"{names[path]}.weight.lora_b"] = np.ascontiguousarray(b)
    return tensors


def _write(
    file: Path, tensors: Tensors, architecture: Architecture, alpha: float, name: str
) -> None:
    from gguf import GGUFType, GGUFWriter, Keys, LlamaFileType

    writer = GGUFWriter(file, architecture.name)
    try:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_file_type(LlamaFileType.ALL_F32)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        for tensor, array in tensors.items():
            writer.add_tensor(tensor, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _check(
    file: Path,
    adapters: list[tuple[str, Adapter]],
    architecture: Architecture,
    config: ModelConfig,
) -> None:
    """Raise unless ``file``, read by the importer's table, holds the factors of ``adapters``."""
    stored = read_gguf(file)
    expected = {inner_path(path): adapter for path, adapter in adapters}
    wrong = []
    for tensor in stored.tensors:
        name, _, leaf = tensor.rpartition(".")
        place = architecture.module_of(name)
        if place is None or place[0] not in expected:
            wrong.append(tensor)
            continue
        adapter = expected[place[0]]
        value = stored.read(tensor)["weight"]
        if leaf == "lora_b":
            value = architecture.from_gguf(value, place[0], leaf, config)
        if not np.array_equal(np.array(value), _factors(adapter)[leaf == "lora_b"]):
            wrong.append(tensor)
    if wrong or len(stored.tensors) != 2 * len(adapters):
        raise SlimError(
            f"{file.name} reads back with other factors ({few(wrong)}); it was not kept",
            "please report it",
        )
