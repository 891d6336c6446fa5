"""Export of adapters to Hugging Face PEFT, and import from it.

Invariant: what is written is read back first and compared with PEFT's formula, written out
(``adapters/peft_plain.py``): weights of every layer, and logits. A base that cannot be loaded, or
that the adapter does not fit, is one line, and nothing is written. Try it:
``mlx-slim export runs/mine --to peft -o peft`` and ``mlx-slim import peft -o adapters``.
"""

from __future__ import annotations

import contextlib
import copy
import shlex
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.adapters.peft import differing, place_peft, place_plain, write_peft
from mlx_slim.adapters.peft_rules import PeftFolder, read_folder, read_settings
from mlx_slim.adapters.store import CONFIG, load_adapter, save_adapter
from mlx_slim.artifacts import atomic_folder, public_name
from mlx_slim.claims import makes_folder
from mlx_slim.errors import SlimError
from mlx_slim.events import Observer
from mlx_slim.export.card import Card, describe
from mlx_slim.export.fuse import find_adapter
from mlx_slim.export.model import Exported, add_versions, stage_notifier
from mlx_slim.export.options import PeftOptions
from mlx_slim.models.load import Loaded, read_config
from mlx_slim.models.logits_close import Change, logits_close, rounding
from mlx_slim.models.structure import blocks
from mlx_slim.models.tensors import few
from mlx_slim.models.verified_save import compute_dtype
from mlx_slim.quantization.base import load_base
from mlx_slim.reading import field, read_object

_PROBE = 16  # tokens on which what was written is compared


def base_of(adapter: str | Path, recorded: str | None, requested: str | None) -> str:
    """Return the base of an adapter: the requested one, else the one that it names.

    Raises:
        SlimError: If there is neither.
    """
    base = requested or recorded
    if not base:
        raise SlimError(f"{adapter} names no base model", "give it with --model")
    return base


@contextlib.contextmanager
def base_errors(adapter: Path, requested: bool) -> Iterator[None]:
    """Say of which adapter a base is that cannot be read, unless it was ``requested``."""
    try:
        yield
    except SlimError as error:
        if requested:
            raise
        raise SlimError(
            f"the base of {adapter} cannot be loaded: {error.message}",
            "if it moved, give its new place with --model",
        ) from error


def _load_base(adapter: Path, base: str, requested: bool) -> Loaded:
    with base_errors(adapter, requested):
        return load_base(base, [adapter], dtype=compute_dtype())


@makes_folder("export --to peft")
def export_peft(
    source: Path,
    out: Path,
    *,
    base: str | None = PeftOptions.base,
    base_name: str | None = PeftOptions.base_name,
    observer: Observer | None = None,
) -> Exported:
    """Write an adapter folder as a PEFT adapter.

    Args:
        source: Adapter folder, ours or mlx-lm's, or the run that holds it.
        out: Must not exist.
        base: Folder or hub id of the base; None takes the one that the adapter names.
        base_name: What ``base_model_name_or_path`` says; None repeats the base.
        observer: Gets a ``Notice`` for each stage.

    Raises:
        SlimError: If the adapter does not fit the base, the base cannot be loaded, PEFT cannot
            represent it, or what is read back differs; nothing is written.
    """
    say = stage_notifier(observer)
    source = find_adapter(source)
    settings = read_object(source / CONFIG)
    if "peft_type" in settings:
        raise SlimError(f"{source} is a PEFT adapter already", "no export is needed")
    place = base_of(source, field(settings, str(source / CONFIG), "model", str, None), base)
    say(f"loading {place}")
    loaded = _load_base(source, place, base is not None)
    tuned = copy.deepcopy(loaded.model)
    injected = load_adapter(tuned, source)
    tied = bool(loaded.config.get("tie_word_embeddings"))
    trained = field(settings, str(source / CONFIG), "trained_with", dict, {})
    named = base_name or place
    facts = [f"note       {note}" for note in loaded.notes]
    quantized = "quantization" in read_config(place)
    if quantized and base_name is None:
        facts.append(
            f"note       {named} is quantized for MLX; PEFT needs its dense original: name it with "
            "--base-name"
        )
    with atomic_folder(out) as temporary:
        write_peft(
            temporary,
            tuned,
            injected,
            base=named,
            dropout=float(settings.get("lora_parameters", {}).get("dropout", 0.0)),
            rslora=trained.get("scaling") == "rslora",
            tied=tied,
        )
        _check(out, loaded, tuned, read_folder(temporary, loaded.model, tied=tied))
        kind = "DoRA" if settings.get("fine_tune_type") == "dora" else "LoRA"
        card = Card(
            title=f"{kind} adapter for {public_name(named)}",
            base=named,
            library="peft",
            what=f"A {kind} adapter in PEFT's format, written by mlx-slim.",
            usage=[
                "from transformers import AutoModelForCausalLM",
                "from peft import PeftModel",
                f"base = AutoModelForCausalLM.from_pretrained({public_name(named)!r})",
                'model = PeftModel.from_pretrained(base, "this folder")',
            ],
        )
        describe(source, card)
        add_versions(card)
        card.write(temporary)
    facts.insert(
        0, f"{out}: {kind} over {len(injected.paths)} layers, {injected.parameters:,} parameters"
    )
    facts.append("checked    read back, the logits of PEFT's formula")
    return Exported(out, facts)


@makes_folder("import")
def import_peft(
    source: Path, out: Path, *, base: str | None = None, observer: Observer | None = None
) -> Exported:
    """Write a PEFT adapter as an adapter folder of mlx-slim and mlx-lm.

    Args:
        source: A folder that PEFT's ``save_pretrained`` wrote.
        out: Must not exist.
        base: Folder or hub id of the base; None takes the one that the adapter names.
        observer: Gets a ``Notice`` for each stage.

    Raises:
        SlimError: If it is no LoRA or DoRA, does not fit the base, or reads back differently.
    """
    say = stage_notifier(observer)
    settings = read_settings(source)
    place = base_of(source, settings.get("base_model_name_or_path"), base)
    say(f"loading {place}")
    loaded = _load_base(source, place, base is not None)
    tuned = copy.deepcopy(loaded.model)
    tied = bool(loaded.config.get("tie_word_embeddings"))
    peft = read_folder(source, loaded.model, tied=tied)
    placed = place_peft(tuned, peft)
    with atomic_folder(out) as temporary:
        folder = temporary / "adapters"
        save_adapter(folder, tuned, placed.config, placed.injected, dora=placed.dora, base=place)
        again = copy.deepcopy(loaded.model)
        load_adapter(again, folder)
        _check(out, loaded, again, peft)
        for file in list(folder.iterdir()):
            file.rename(temporary / file.name)
        folder.rmdir()
    kind = "DoRA" if placed.dora else "LoRA"
    injected = placed.injected
    facts = [
        f"{out}: {kind} over {len(injected.paths)} layers, rank {placed.config.rank}, scale "
        f"{injected.scale:g}, {injected.parameters:,} parameters",
        *(f"note       {note}" for note in placed.notes),
        "checked    read back, the logits of PEFT's formula",
    ]
    command = ["mlx-slim", "chat", place, "--adapter", str(out)]
    return Exported(out, facts, [shlex.join(command)])


def _check(out: Path, loaded: Loaded, tuned: nn.Module, peft: PeftFolder) -> None:
    """Raise unless ``tuned`` is the base with ``peft`` as PEFT computes it."""
    wrong = differing(tuned, peft)
    plain = copy.deepcopy(loaded.model)
    place_plain(plain, peft)
    vocabulary = int(loaded.config.get("vocab_size") or 256)
    ids_1T = mx.array([[(7919 * i + 11) % vocabulary for i in range(_PROBE)]])
    plain.eval()
    tuned.eval()
    expected, logits = (model(ids_1T) for model in (plain, tuned))
    tolerance = rounding(len(blocks(tuned)), expected.dtype, logits.dtype)
    difference = logits_close(logits, expected, Change.WEIGHTS, tolerance=tolerance)
    if wrong or not difference.close:
        raise SlimError(
            f"{out}: the written adapter computes other logits than PEFT: {difference}"
            + (f", layers that differ: {few(wrong)}" if wrong else "")
            + "; it was removed",
            "please report it",
        )
