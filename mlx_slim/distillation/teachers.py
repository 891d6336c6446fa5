"""Who teaches: loaded with its adapter, known by its hash, and whether it speaks our tokens.

Invariant: logits are compared only where the same id means the same text on both sides and both cut
texts into the same ids; equal vocabulary sizes prove nothing (Mistral-7B and LLaMA-2 both have
32,000 tokens, of other words). Try it: ``mlx-slim distill distill-smollm2 --dry-run``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.adapters.store import load_adapter
from mlx_slim.artifacts import hash_files, is_hub_id, public_name
from mlx_slim.config.distill import TeacherConfig
from mlx_slim.config.schema import Recipe
from mlx_slim.data.tokenize import unwrap
from mlx_slim.errors import SlimError
from mlx_slim.models.load import load, resolve
from mlx_slim.models.quantized import densify, densify_pays
from mlx_slim.models.tensors import WEIGHTS
from mlx_slim.reading import read_object
from mlx_slim.runtime import dtype_name

# Scripts, spaces, digits, code, signs: where tokenizers of one vocabulary still differ.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    " leading and trailing spaces  ",
    "line\n\nbreaks\r\n\tand tabs",
    "don't we'll I'VE it's",
    "3.14159 1,000,000 2024-05-17 0x1F 12345678901234567890",
    "def f(x):\n    return {'a': [x ** 2, x // 3]}  # comment",
    "Größe naïve façade año coração Łódź",
    "Привет, мир! Как дела?",
    "你好，世界。こんにちは 안녕하세요",
    "مرحبا بالعالم שלום עולם नमस्ते",
    "🙂👩‍👩‍👧 ½ ™ € → ∑ “quotes” – dashes …",
    "CamelCaseWord snake_case_word UPPERCASE aaaaaaaaaaaaaaaaaaaa",
    "<b>html</b> &amp; http://example.org/a?b=c&d=%20",
)
_SPECIAL = ("bos", "eos", "unk")


def with_model(teacher: TeacherConfig, recipe: Recipe) -> TeacherConfig:
    """Return ``teacher`` with its model filled in: None is what the student came from.

    Raises:
        SlimError: If a pruned folder does not say where that is found.
    """
    if teacher.model is not None:
        return teacher
    record = Path(recipe.model) / "prune.json"
    if not record.is_file():
        return teacher.model_copy(update={"model": recipe.model, "revision": recipe.revision})
    origin = read_object(record, source=str)
    if not is_hub_id(origin["source"]):
        raise SlimError(
            f"{recipe.model} was pruned from a folder called {origin['source']}",
            "say where it is: distill.teachers=[{model: FOLDER}]",
        )
    found = {"model": origin["source"], "revision": origin.get("revision")}
    return teacher.model_copy(update=found)


@dataclass(frozen=True)
class Disagreement:
    """What differs between two tokenizers, in one line.

    Attributes:
        text: The first difference found.
        words: Whether ids mean other texts or texts get other ids: then logits cannot be compared.
            Else only the special tokens' roles differ.
    """

    text: str
    words: bool


def disagreement(student: Any, teacher: Any) -> Disagreement | None:
    """Return how two tokenizers differ, None if they agree.

    Compares the vocabulary maps, the encodings of a probe corpus, and which ids begin, end and
    stand for the unknown.

    Args:
        student: mlx-lm's ``TokenizerWrapper``, or a Hugging Face tokenizer.
        teacher: Likewise.
    """
    ours, theirs = unwrap(student), unwrap(teacher)
    mine, other = ours.get_vocab(), theirs.get_vocab()
    if mine != other:
        return Disagreement(_vocabularies(mine, other), words=True)
    for probe in PROBES:
        a, b = (list(t.encode(probe, add_special_tokens=False)) for t in (ours, theirs))
        if a != b:
            return Disagreement(f"{probe[:24]!r} is {a[:6]}… here, {b[:6]}… there", words=True)
    for name in _SPECIAL:
        a, b = (getattr(t, f"{name}_token_id", None) for t in (ours, theirs))
        if a != b:
            words = (
                repr(t.convert_ids_to_tokens(i)) if i is not None else "none"
                for t, i in ((ours, a), (theirs, b))
            )
            return Disagreement("{} is {} here, {} there".format(name, *words), words=False)
    return None


def _vocabularies(mine: dict[str, int], other: dict[str, int]) -> str:
    """Return the first difference of two vocabulary maps in words."""
    moved = sorted((mine[w], w) for w in mine.keys() & other.keys() if mine[w] != other[w])
    alone = sorted((mine[w], w) for w in mine.keys() - other.keys())
    extra = sorted((other[w], w) for w in other.keys() - mine.keys())
    sizes = f"{len(mine):,} tokens here, {len(other):,} there"
    if moved:
        number, word = moved[0]
        example = f"{word!r}: {number} here, {other[word]} there"
        return f"{sizes}; {len(moved):,} have another id, such as {example}"
    number, word = (alone or extra)[0]
    example = f"{word!r} ({number} {'here' if alone else 'there'})"
    return f"{sizes}; {len(alone) + len(extra):,} are on one side only, such as {example}"


def name_of(teacher: TeacherConfig) -> str:
    """Return what reports call a teacher."""
    return teacher.name or public_name(teacher.model or "teacher")


def fingerprint(teacher: TeacherConfig, dtype: mx.Dtype) -> dict[str, Any]:
    """Return what a teacher's logits depend on: hashes of its files, and how they are computed.

    Raises:
        SlimError: If it cannot be found.
    """
    folder = resolve(_source(teacher), teacher.revision)
    adapter = None
    if teacher.adapter is not None:
        adapter = hash_files(Path(teacher.adapter).glob("adapter*"))
    weights = hash_files([*folder.glob(WEIGHTS), folder / "config.json"])
    return {"weights": weights, "adapter": adapter, "dtype": dtype_name(dtype)}


def load_teacher(teacher: TeacherConfig, dtype: mx.Dtype) -> nn.Module:
    """Return the teacher with its adapter, in evaluation mode.

    Raises:
        SlimError: If it cannot be loaded.
    """
    model = load(_source(teacher), revision=teacher.revision, dtype=dtype).model
    if teacher.adapter is not None:
        load_adapter(model, teacher.adapter)
    if densify_pays(model):
        densify(model)
    model.eval()
    mx.eval(model.parameters())
    return model


def _source(teacher: TeacherConfig) -> str:
    if teacher.model is None:
        raise SlimError("a teacher has no model", "set distill.teachers=[{model: …}]")
    return teacher.model
