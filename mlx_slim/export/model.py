"""Export of models to other toolkits: Hugging Face folders and GGUF files.

Invariant: whatever is written was read back first and gives the results of its source (bit for bit,
or within the rounding of a block format, tensor by tensor); an interrupted export leaves nothing.
Each output carries a card (``README.md``) with its metrics and provenance. Try it: ``mlx-slim
export MODEL --to gguf --type q8_0 -o DIR``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.adapters.store import CONFIG
from mlx_slim.artifacts import atomic_folder, provenance, public_name
from mlx_slim.claims import makes_folder
from mlx_slim.errors import SlimError
from mlx_slim.events import Notice, Observer
from mlx_slim.export.audit_text import audit_tokens
from mlx_slim.export.card import Card, describe
from mlx_slim.export.options import GgufOptions, HfOptions
from mlx_slim.models import fidelity
from mlx_slim.models.gguf.load import import_gguf
from mlx_slim.models.gguf.types import check_type
from mlx_slim.models.gguf.write import check_writable_as_gguf, language_model, write_gguf
from mlx_slim.models.hf import check_writable_as_hf, hf_config
from mlx_slim.models.load import Loaded, load, read_config
from mlx_slim.models.opening import cast, open_weights
from mlx_slim.models.quantized import dense_parameters, densify, is_quantized
from mlx_slim.models.recorded_logits import RecordedLogits, free_weights
from mlx_slim.models.row_limits import row_limit
from mlx_slim.models.tensors import folder_tensors
from mlx_slim.models.verified_save import compute_dtype, save_checked, stored_dtype
from mlx_slim.runtime import dtype_name, resolve_dtype, to_float
from mlx_slim.units import human_bytes

# Relative error of a tensor that a block format may cause; a wrong row order causes 1.4.
_ROUNDING = {"F32": 1e-6, "F16": 0.002, "Q8_0": 0.02, "Q6_K": 0.05}
_ROUNDING |= dict.fromkeys(("Q5_0", "Q5_1", "Q5_K"), 0.15)
_ROUNDING |= dict.fromkeys(("Q4_0", "Q4_1", "Q4_K"), 0.3)


@dataclass(frozen=True)
class Exported:
    """What was stored.

    Attributes:
        path: The folder.
        facts: The summary, one fact a line.
        commands: How to use it, ready to run.
    """

    path: Path
    facts: list[str]
    commands: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return what the command prints."""
        return [*self.facts, *(f"use it     {command}" for command in self.commands)]


def stage_notifier(observer: Observer | None) -> Callable[[str], None]:
    """Return a function that notifies ``observer``, if there is one, of a stage."""
    return lambda text: observer.notify(Notice(text)) if observer is not None else None


def add_versions(card: Card) -> None:
    """Name the versions that made an artifact whose records name none."""
    if not any(name == "versions" for name, _ in card.provenance):
        versions = provenance()["versions"]
        card.provenance.append(("versions", ", ".join(f"{k} {v}" for k, v in versions.items())))


def model_folder(source: str | Path) -> str | Path:
    """Return the model that ``source`` is, or that its run holds; refuse an adapter."""
    folder = Path(source)
    if (folder / "model" / "config.json").is_file() and not (folder / "config.json").is_file():
        return folder / "model"
    for candidate in (folder, folder / "adapters"):
        if (candidate / CONFIG).is_file() and not (folder / "config.json").is_file():
            raise SlimError(
                f"{candidate} is an adapter, not a model",
                "fuse it first (mlx-slim fuse MODEL --adapter DIR -o FUSED), or export the adapter "
                "itself: --to peft, --to gguf-adapter; --to ollama takes base and adapter",
            )
    return source


@makes_folder("export --to hf")
def export_hf(
    source: str | Path,
    out: Path,
    *,
    dtype: str | None = HfOptions.dtype,
    revision: str | None = HfOptions.revision,
    observer: Observer | None = None,
) -> Exported:
    """Write a model as a folder that transformers loads; a quantized one dequantized.

    Args:
        source: Folder or hub id, or the run folder of a full fine-tune.
        out: Must not exist.
        dtype: Of the weights; None keeps the source's (of its scales, if quantized).
        revision: Commit or tag of a hub model.
        observer: Gets a ``Notice`` for each stage.

    Raises:
        ResourceError: If the disk is too small.
        SlimError: If the architecture has no equivalent there, or what is read back differs.
    """
    say = stage_notifier(observer)
    source = model_folder(source)
    check_writable_as_hf(read_config(source, revision))
    say(f"loading {source}")
    loaded = load(source, revision=revision, dtype=compute_dtype())
    stored = resolve_dtype(dtype) if dtype else stored_dtype(folder_tensors(loaded.path))
    facts = []
    if is_quantized(loaded.model):
        facts.append(
            f"note       {densify(loaded.model, stored)} quantized layers dequantized to "
            f"{dtype_name(stored)}; --dtype float32 rounds nothing"
        )
    cast(loaded.model, stored)
    config = hf_config(loaded.config)
    name = public_name(source)
    card = Card(
        title=name,
        base=str(source),
        library="transformers",
        what=f"{name} as a Hugging Face model in {dtype_name(stored)}, written by mlx-slim.",
        usage=[
            "from transformers import AutoModelForCausalLM",
            'model = AutoModelForCausalLM.from_pretrained("this folder")',
        ],
    )
    describe(loaded.path, card)
    add_versions(card)
    save_checked(out, loaded, config, stored, card.write)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    facts.insert(
        0, f"{out}: {config['architectures'][0]}, {dtype_name(stored)}, {human_bytes(size)}"
    )
    facts.append("checked    read back, every tensor equal")
    return Exported(out, facts)


@makes_folder("export --to gguf")
def export_gguf(
    source: str | Path,
    out: Path,
    *,
    kind: str = GgufOptions.kind,
    calibration: str | None = GgufOptions.calibration,
    revision: str | None = GgufOptions.revision,
    observer: Observer | None = None,
) -> Exported:
    """Write a model as a GGUF file with an Ollama ``Modelfile`` and a card beside it.

    Args:
        source: Folder or hub id, or the run folder of a full fine-tune.
        out: The folder; must not exist.
        kind: One of ``models.gguf.types.TYPES``.
        calibration: Text on which the file is compared with its source.
        revision: Commit or tag of a hub model.
        observer: Gets a ``Notice`` for each stage.

    Raises:
        ResourceError: If the disk is too small.
        SlimError: If GGUF cannot represent the model, or the file does not read back as the model.
    """
    check_gguf_output(out, kind)
    source = model_folder(source)
    check_writable_as_gguf(read_config(source, revision))
    stage_notifier(observer)(f"loading {source}")
    loaded = load(source, revision=revision, dtype=compute_dtype())
    return write_gguf_folder(loaded, out, kind, calibration=calibration, observer=observer)


def check_gguf_output(out: Path, kind: str) -> None:
    """Refuse an output that names a file, and an unknown type."""
    if out.suffix == ".gguf":
        raise SlimError(
            f"{out} names a file: the output is a folder (GGUF, Modelfile, card)",
            f"use -o {out.with_suffix('')}",
        )
    check_type(kind)


def write_gguf_folder(
    loaded: Loaded,
    out: Path,
    kind: str,
    *,
    name: str | None = None,
    modelfile: str = "",
    calibration: str | None = None,
    observer: Observer | None = None,
) -> Exported:
    """Write ``loaded`` as a folder of a GGUF file, a ``Modelfile`` and a card; check the file.

    Args:
        loaded: The model, as it computes here; its weights are freed.
        out: The folder; must not exist.
        kind: One of ``models.gguf.types.TYPES``.
        name: Of the model; None takes that of its source.
        modelfile: Lines of the ``Modelfile`` after its first line.
        calibration: Text on which the file is compared with its source.
        observer: Gets a ``Notice`` for each stage.

    Raises:
        ResourceError: If the disk is too small.
        SlimError: If GGUF cannot represent the model, or the file does not read back as the model.
    """
    say = stage_notifier(observer)
    name = name or public_name(loaded.source).rsplit("/", 1)[-1]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name) or "model"
    file = f"{name}-{kind}.gguf"
    with atomic_folder(out) as temporary:
        say(f"writing {file}")
        stored = write_gguf(
            temporary / file, loaded.model, loaded.tokenizer, loaded.config, kind, name
        )
        tokens_NT, text = audit_tokens(
            loaded.tokenizer, calibration, limit=row_limit(loaded.config)
        )
        original = RecordedLogits(loaded.model, tokens_NT, out)
        free_weights(loaded.model)
        say("reading it back")
        again = import_gguf(temporary / file).model
        unread = open_weights(loaded.path, dtype=compute_dtype())[0]
        error = _check_rounding(language_model(unread), again, stored.formats, file)
        if (compute := compute_dtype()) is not None:  # a GPU reads the codes as they are
            densify(again)
            cast(again, compute)
        say(f"comparing with the source on {tokens_NT.size:,} tokens")
        agreement = fidelity.compare(original, again, tokens_NT)
        fact = (
            f"KL {agreement.kl:.2g} nats, same top-1 token {agreement.top1:.1%} "
            f"({agreement.tokens:,} tokens of {text})"
        )
        (temporary / "Modelfile").write_text(f"FROM ./{file}\n{modelfile}", encoding="utf-8")
        commands = gguf_commands(out, file, name)
        card = Card(
            title=f"{name}, GGUF {kind.upper()}",
            base=loaded.source,
            library="gguf",
            what=f"{name} for llama.cpp and Ollama, written by mlx-slim.",
            metrics=[(f"{kind.upper()} against its source", fact)],
            usage=gguf_commands(Path(), file, name),
        )
        describe(loaded.path, card)
        add_versions(card)
        card.write(temporary)
    size = (out / file).stat().st_size
    facts = [
        f"{out / file}: {kind.upper()}, {human_bytes(size)} ({stored.counts()})",
        *(f"note       {note}" for note in stored.notes),
        f"checked    read back, largest rounding {error:.2g}; {fact}",
    ]
    return Exported(out, facts, commands)


def gguf_commands(folder: Path, file: str, name: str) -> list[str]:
    """Return the commands that run a GGUF file in llama.cpp and in Ollama."""
    path, modelfile = shlex.quote(str(folder / file)), shlex.quote(str(folder / "Modelfile"))
    tag = name.lower()
    return [
        f"llama-cli -m {path} -p 'Hello'",
        f"ollama create {tag} -f {modelfile} && ollama run {tag}",
    ]


def _check_rounding(
    model: nn.Module, again: nn.Module, formats: dict[str, str], file: str
) -> float:
    """Return the largest ‖a − b‖ / ‖a‖ over the dense parameters.

    Both are compared a parameter at a time, and ``model`` is released as far as it is compared.

    Raises:
        SlimError: If one is beyond the rounding of its format, or there are others.
    """
    source, exported = dense_parameters(model), dense_parameters(again)
    if source.keys() != exported.keys():
        raise _differs(
            file, ", ".join(sorted(source.keys() ^ exported.keys())[:3]), float("inf"), 0
        )
    free_weights(model)
    largest = 0.0
    while source:
        path, value = source.popitem()
        a, b = (dense().astype(mx.float32) for dense in (value, exported.pop(path)))
        size = to_float(mx.linalg.norm(a))
        error = to_float(mx.linalg.norm(a - b)) / size if size else 0.0
        limit = _ROUNDING[formats[path]]
        if not error <= limit:
            raise _differs(file, path, error, limit)
        largest = max(largest, error)
    return largest


def _differs(file: str, path: str, error: float, limit: float) -> SlimError:
    return SlimError(
        f"{file}: {path} reads back with a relative error of {error:.2g}, expected at most "
        f"{limit:g} from rounding; the file was removed",
        "please report it",
    )
