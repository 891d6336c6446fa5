"""Which base an adapter belongs to: the quantized one, where it was trained over one.

Invariant: an adapter computes over the very weights that it was trained over. QLoRA over a dense
model keeps its quantized base in the run folder and names it in ``adapter_config.json``; whoever is
given the dense model with that adapter reads the run's base instead, or, where that is gone, makes
it again: the same rounding of the same tensors, each as it is read. Try it:
``mlx-slim generate MODEL --adapter RUN/adapters --prompt Hello``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.config.schema import QuantizeConfig, Recipe
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.models.load import Loaded, Transform, load, read_config
from mlx_slim.models.opening import cast, read_weights
from mlx_slim.models.quantized import LayerFormat
from mlx_slim.models.streamed import Unread, unread
from mlx_slim.quantization.apply import load_quantized, quantize_model
from mlx_slim.reading import JsonObject, field, library_errors, read_object, short, shown
from mlx_slim.runtime import DTYPES, dtype_name, resolve_dtype

CONFIG = "adapter_config.json"
RECORD = "quantized_base"


@dataclass(frozen=True)
class QuantizedBase:
    """A dense model as a run quantized it.

    Attributes:
        model: The dense model, as the recipe named it.
        revision: Branch, tag or commit of a hub id.
        quantize: How it was rounded.
        dtype: That it was cast to before it was rounded.
        stored: What the dense model's weights are stored in.
        folder: The quantized model, relative to the adapter's folder; None if it is not stored.
    """

    model: str
    revision: str | None
    quantize: LayerFormat
    dtype: str
    stored: str
    folder: str | None = None

    def same_weights(self, other: QuantizedBase) -> bool:
        """Return whether both are rounded alike."""
        return (self.quantize, self.dtype) == (other.quantize, other.dtype)

    def __str__(self) -> str:
        """Return its format in words."""
        return str(self.quantize)


def quantized_base(recipe: Recipe) -> QuantizedBase | None:
    """Return what ``recipe`` (QLoRA) quantizes its model to; None if it is quantized already.

    Raises:
        SlimError: If the model's config cannot be read.
    """
    if recipe.method != "qlora":
        return None
    config = read_config(recipe.model, recipe.revision)
    if "quantization" in config:
        return None
    settings = recipe.quantize
    return QuantizedBase(
        model=recipe.model,
        revision=recipe.revision,
        quantize=LayerFormat(settings.group_size, settings.bits, settings.mode),
        dtype=dtype_name(resolve_dtype(recipe.train.dtype)),
        stored=str(config.get("dtype") or config.get("torch_dtype")),
    )


def recorded_base(adapters: Sequence[Path]) -> tuple[Path, QuantizedBase] | None:
    """Return the adapter folder that names a quantized base, and what it names.

    Raises:
        SlimError: If two adapters name bases that are rounded differently.
    """
    recorded: tuple[Path, QuantizedBase] | None = None
    for folder in adapters:
        file = folder / CONFIG
        config = read_object(file) if file.is_file() else {}
        record = field(config, short(file), RECORD, dict, None)
        if record is None:
            continue
        named = _named(record, f"{short(file)}: {RECORD}")
        if recorded is not None and not recorded[1].same_weights(named):
            raise SlimError(
                f"{recorded[0]} was trained on {recorded[1]} in {recorded[1].dtype}, "
                f"{folder} on {named} in {named.dtype}",
                "adapters can be summed only on the same base: leave one of them out",
            )
        recorded = recorded or (folder, named)
    return recorded


def _named(record: JsonObject, where: str) -> QuantizedBase:
    for key in ("model", "stored"):
        field(record, where, key, str)
    for key in ("revision", "folder"):
        field(record, where, key, str, None)
    if field(record, where, "dtype", str) not in DTYPES:
        raise SlimError(
            f"{where}: dtype is {shown(record['dtype'])}", did_you_mean(record["dtype"], DTYPES)
        )
    settings = field(record, where, "quantize", dict)
    base_folder = record.get("folder")
    if base_folder is not None and not re.fullmatch(r"(\.\./)?[\w-][\w.-]*", base_folder):
        raise SlimError(
            f"{where}: folder is {shown(base_folder)}, expected one beside the adapter",
            "copy it again",
        )
    with library_errors(f"{where} cannot be used", "copy it again"):
        QuantizeConfig(**settings)
        return QuantizedBase(**{**record, "quantize": LayerFormat(**settings)})


def load_base(
    source: str | Path,
    adapters: Sequence[Path] = (),
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    trust_remote_code: bool = False,
    transform: Transform | None = None,
    lazy: bool = False,
    half_blocks: bool = False,
) -> Loaded:
    """Load ``source`` as the base of ``adapters``, which are not put on it.

    A dense ``source`` is replaced by the quantized base that the adapters name, and ``notes`` say
    so; a quantized one is loaded as it is.

    Args:
        source: Folder or hub id.
        adapters: Adapter folders.
        revision: Branch, tag or commit of a hub id.
        dtype: As ``load`` takes it.
        trust_remote_code: Run Python files that the repository brings.
        transform: As ``load`` takes it, where ``source`` itself is loaded.
        lazy: Likewise.
        half_blocks: Likewise.

    Raises:
        SlimError: As ``load``; if the adapters name different bases.
    """
    computed, note = _computed_with(source, adapters, revision)
    if computed is None:
        return load(
            source,
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            transform=transform,
            lazy=lazy,
            half_blocks=half_blocks,
        )
    if isinstance(computed, Path):
        loaded = load(computed, dtype=dtype)
    else:
        settings = QuantizeConfig.model_validate(asdict(computed.quantize))
        loaded, _ = load_quantized(
            source,
            settings,
            revision=revision,
            dtype=DTYPES[computed.dtype],
            trust_remote_code=trust_remote_code,
        )
        if dtype is not None and dtype != DTYPES[computed.dtype]:
            cast(loaded.model, dtype)
            read_weights(loaded.model)
    return replace(loaded, source=str(source), notes=[*loaded.notes, note])


def unread_base(
    source: str | Path,
    adapters: Sequence[Path] = (),
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    trust_remote_code: bool = False,
) -> Unread:
    """Return what ``load_base`` does, its weights unread; the arguments are the same.

    Raises:
        SlimError: As ``load_base``.
    """
    computed, note = _computed_with(source, adapters, revision)
    if computed is None:
        return unread(source, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    if isinstance(computed, Path):
        read = unread(computed, dtype=dtype)
        return replace(read, source=str(source), notes=[*read.notes, note])
    read = unread(source, revision=revision, dtype=DTYPES[computed.dtype])
    settings = QuantizeConfig.model_validate(asdict(computed.quantize))

    def open_model() -> nn.Module:
        model = read.open()
        quantize_model(model, read.config, settings, read=False)
        if dtype is not None:
            cast(model, dtype)
        return model

    config = quantize_model(read.open(), read.config, settings, read=False).config
    notes = [*read.notes, note]
    return replace(read, open=open_model, config=config, source=str(source), notes=notes)


def _computed_with(
    source: str | Path, adapters: Sequence[Path], revision: str | None
) -> tuple[Path | QuantizedBase | None, str]:
    """Return what adapters compute over in place of ``source``, and a note that says so.

    A folder, or how ``source`` is quantized again; None and no note for ``source`` itself.
    """
    recorded = recorded_base(adapters)
    if recorded is None or "quantization" in read_config(source, revision):
        return None, ""
    adapter, named = recorded
    folder = None if named.folder is None else (adapter / named.folder).resolve()
    trained = f"{adapter} was trained on {source} in {named}"
    if folder is not None and (folder / "config.json").is_file() and _same(source, revision, named):
        return folder, f"{trained}: computing with {folder}"
    return named, f"{trained}: quantized again while it was read"


def _same(source: str | Path, revision: str | None, named: QuantizedBase) -> bool:
    """Return whether ``source`` is the dense model that ``named`` was made of."""
    if revision is not None and revision != named.revision:
        return False
    one, other = Path(source), Path(named.model)
    if one.exists() and other.exists():
        return one.resolve() == other.resolve()
    return str(source) == named.model


def as_record(named: QuantizedBase, folder: str) -> JsonObject:
    """Return the entry of ``adapter_config.json`` for a base that is stored in ``folder``."""
    keys = ("bits", "group_size", "mode")  # in the order that is on disk
    quantize = {key: getattr(named.quantize, key) for key in keys}
    return {RECORD: {**asdict(named), "quantize": quantize, "folder": folder}}
