"""Export for Ollama: a GGUF file and a ``Modelfile`` with template, stops and parameters.

Invariant: the ``TEMPLATE`` renders what the model's own chat template renders (``chat_format.py``);
one that cannot be written so is refused before weights are read. An adapter is fused into its base
first, because Ollama takes no adapters any more (since 0.34.1); what is refused or killed leaves
nothing. Try it: ``mlx-slim export MODEL --to ollama -o DIR``, then ``ollama create mine -f
DIR/Modelfile``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_slim import locks
from mlx_slim.adapters.store import CONFIG
from mlx_slim.claims import makes_folder
from mlx_slim.data.tokenize import unwrap
from mlx_slim.errors import SlimError
from mlx_slim.events import Observer
from mlx_slim.export.chat_format import ChatFormat, find_format
from mlx_slim.export.fuse import ADAPTER_FOLDER, fuse
from mlx_slim.export.fuse_audit import FusingLoses
from mlx_slim.export.model import (
    Exported,
    check_gguf_output,
    model_folder,
    stage_notifier,
    write_gguf_folder,
)
from mlx_slim.export.options import FuseOptions, OllamaOptions
from mlx_slim.export.peft import base_errors, base_of
from mlx_slim.models.config_checks import GENERATION
from mlx_slim.models.gguf.write import check_writable_as_gguf
from mlx_slim.models.hub import resolve
from mlx_slim.models.load import load, load_tokenizer, read_config
from mlx_slim.models.verified_save import compute_dtype
from mlx_slim.reading import JsonObject, ModelConfig, field, read_object

_CONTEXT = 8192  # tokens, at most: Ollama reserves memory for all of them
# generation_config.json -> PARAMETER
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@makes_folder("export --to ollama")
def export_ollama(
    source: str | Path,
    out: Path,
    *,
    kind: str = OllamaOptions.kind,
    base: str | None = OllamaOptions.base,
    calibration: str | None = OllamaOptions.calibration,
    revision: str | None = OllamaOptions.revision,
    observer: Observer | None = None,
) -> Exported:
    """Write a model, or an adapter fused into its base, as a folder that Ollama imports.

    Args:
        source: Folder or hub id of a model, an adapter folder, or a run folder of either.
        out: The folder; must not exist.
        kind: One of ``models.gguf.types.TYPES``.
        base: Of an adapter: folder or hub id of its base; None takes the one that it names.
        calibration: Text on which models are compared.
        revision: Commit or tag of a hub model.
        observer: Gets a ``Notice`` for each stage.

    Raises:
        ResourceError: If memory or disk are too small.
        SlimError: If GGUF or Ollama cannot represent the model, or the file does not read back as
            the model; nothing is written.
    """
    check_gguf_output(out, kind)
    adapter = _adapter(Path(source))
    place: str | Path
    if adapter is None:
        place = model_folder(source)
        if base is not None:
            raise SlimError(
                f"{source} is a model, --model is the base of an adapter", "leave it out"
            )
    else:
        settings = read_object(adapter / CONFIG)
        named = field(settings, str(adapter / CONFIG), "model", str, None)
        place = base_of(adapter, named, base)
    with base_errors(adapter or Path(), adapter is None or base is not None):
        config = read_config(place, revision)
        tokenizer = load_tokenizer(place, revision=revision)
    check_writable_as_gguf(config)
    folder = resolve(place, revision)
    modelfile, notes = describe_chat(tokenizer, config, folder)
    with _fused(place, adapter, out, calibration, revision, observer) as model:
        stage_notifier(observer)(f"loading {place}")
        loaded = load(model, revision=revision, dtype=compute_dtype())
        done = write_gguf_folder(
            replace(loaded, source=str(place)),
            out,
            kind,
            name=None if adapter is None else _run_name(adapter),
            modelfile=modelfile,
            calibration=calibration,
            observer=observer,
        )
    facts = [*done.facts, *(f"note       {note}" for note in notes)]
    return Exported(out, facts, done.commands[::-1])


def _adapter(source: Path) -> Path | None:
    """Return the adapter that ``source`` is, or that its run holds."""
    if (source / "config.json").is_file() or (source / "model" / "config.json").is_file():
        return None
    places = (source, source / ADAPTER_FOLDER)
    return next((place for place in places if (place / CONFIG).is_file()), None)


def _run_name(adapter: Path) -> str:
    folder = adapter.resolve()
    return folder.parent.name if folder.name == ADAPTER_FOLDER else folder.name


@contextlib.contextmanager
def _fused(
    place: str | Path,
    adapter: Path | None,
    out: Path,
    calibration: str | None,
    revision: str | None,
    observer: Observer | None,
) -> Iterator[str | Path]:
    """Yield the model at ``place``, or it with ``adapter`` in a folder that goes afterwards."""
    if adapter is None:
        yield place
        return
    with locks.hold(out) as work:  # its inputs go with it, or with the next one after a kill
        inputs = work.folder / locks.INPUTS
        inputs.mkdir()
        folder = inputs / "fused"
        _fuse(
            place,
            adapter,
            folder,
            FuseOptions(calibration=calibration, revision=revision),
            observer,
        )
        yield folder


def _fuse(
    place: str | Path,
    adapter: Path,
    folder: Path,
    options: FuseOptions,
    observer: Observer | None,
) -> None:
    try:
        fuse(place, adapter, folder, options, observer)
    except FusingLoses as error:
        raise SlimError(
            error.message, "fuse it yourself, as mlx-slim fuse --help says, and export that"
        ) from error


# ------------------------------------------------------------------- Modelfile


def describe_chat(tokenizer: Any, config: ModelConfig, folder: Path) -> tuple[str, list[str]]:
    """Return the lines of a ``Modelfile`` after ``FROM``, and what to say of it.

    Args:
        tokenizer: mlx-lm's wrapper.
        config: The model's, normalised.
        folder: Of the model: its ``generation_config.json`` is read.

    Raises:
        SlimError: If the chat template has no counterpart in Ollama.
    """
    generation = read_object(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    if unwrap(tokenizer).chat_template is None:
        chat_format, notes = None, ["the model has no chat template: Ollama completes texts"]
        template = "{{ .Prompt }}"
    else:
        chat_format, notes = find_format(tokenizer)
        template = chat_format.go()
    context = config.get("max_position_embeddings")
    if context and context > _CONTEXT:
        notes.append(f"num_ctx is {_CONTEXT:,} of the model's {context:,} tokens: memory for all")
    parameters = [
        ("stop", f'"{stop}"') for stop in _stops(tokenizer, config, generation, chat_format)
    ]
    parameters += [("num_ctx", str(min(context, _CONTEXT)))] if context else []
    parameters += _sampling(generation)
    lines = [f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER {name} {value}" for name, value in parameters]
    return "\n".join(lines) + "\n", notes


def _stops(
    tokenizer: Any, config: ModelConfig, generation: JsonObject, chat_format: ChatFormat | None
) -> list[str]:
    """Return the texts at which an answer ends: end tokens, and what closes a turn."""
    inner = unwrap(tokenizer)
    ids = [inner.eos_token_id]
    for source in (config, generation):
        ends = source.get("eos_token_id")
        ids += ends if isinstance(ends, list) else [ends]
    tokens = [inner.convert_ids_to_tokens(index) for index in ids if isinstance(index, int)]
    if chat_format is not None:
        closing = chat_format.answer[1]
        special = [token for token in inner.get_added_vocab() if token in closing]
        special = sorted(special, key=closing.index)[:1]
        # Without a token of its own, an answer ends where the user's next turn would begin.
        tokens += special or (
            [chat_format.user[0].strip()] if not any(map(closing.count, tokens)) else []
        )
    return [token for token in dict.fromkeys(tokens) if token and '"' not in token]


def _sampling(generation: JsonObject) -> list[tuple[str, str]]:
    if generation.get("do_sample") is False:
        return [("temperature", "0")]
    values = [(name, generation.get(key)) for key, name in _SAMPLING.items()]
    return [(name, f"{value:g}") for name, value in values if type(value) in (int, float)]
