"""Teachers: loading, a hash of what decides their logits, and the comparison of tokenizers.

Invariant: logits are compared only where each id is the same token on both sides and both encode
texts into the same ids; equal vocabulary sizes do not suffice (Mistral-7B and LLaMA-2 both have
32,000 tokens, and they differ). Try it: ``mlx-slim distill distill-smollm2 --dry-run``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.adapters.store import load_adapter
from mlx_slim.artifacts import hash_files, public_name
from mlx_slim.config.distill import TeacherConfig
from mlx_slim.data.tokenize import unwrap
from mlx_slim.errors import SlimError
from mlx_slim.models.load import load, resolve
from mlx_slim.models.quantized import densify, densify_pays
from mlx_slim.models.tensors import WEIGHTS
from mlx_slim.reading import JsonObject
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


@dataclass(frozen=True)
class TokenizerDifference:
    """How two tokenizers differ.

    Attributes:
        text: The first difference, in one line.
        encodings: Whether vocabularies or encodings differ: then logits cannot be compared. Else
            only the roles of special tokens do.
    """

    text: str
    encodings: bool


def tokenizer_difference(student: Any, teacher: Any) -> TokenizerDifference | None:
    """Return how two tokenizers differ, None if they agree.

    Compares the vocabulary maps, the encodings of a probe corpus, and which ids begin, end and
    stand for unknown tokens.

    Args:
        student: mlx-lm's ``TokenizerWrapper``, or a Hugging Face tokenizer.
        teacher: Likewise.
    """
    ours, theirs = unwrap(student), unwrap(teacher)
    vocabulary, other = ours.get_vocab(), theirs.get_vocab()
    if vocabulary != other:
        return TokenizerDifference(_vocabularies(vocabulary, other), encodings=True)
    for probe in PROBES:
        a, b = (list(t.encode(probe, add_special_tokens=False)) for t in (ours, theirs))
        if a != b:
            text = f"{probe[:24]!r} is {a[:6]}… for the student, {b[:6]}… for the teacher"
            return TokenizerDifference(text, encodings=True)
    for name in _SPECIAL:
        a, b = (getattr(t, f"{name}_token_id", None) for t in (ours, theirs))
        if a != b:
            one, two = (
                repr(t.convert_ids_to_tokens(i)) if i is not None else "none"
                for t, i in ((ours, a), (theirs, b))
            )
            text = f"{name} is {one} for the student, {two} for the teacher"
            return TokenizerDifference(text, encodings=False)
    return None


def _vocabularies(student: dict[str, int], teacher: dict[str, int]) -> str:
    """Return the first difference of two vocabulary maps as a sentence."""
    shared = student.keys() & teacher.keys()
    moved = sorted((student[t], t) for t in shared if student[t] != teacher[t])
    removed = sorted((student[t], t) for t in student.keys() - teacher.keys())
    added = sorted((teacher[t], t) for t in teacher.keys() - student.keys())
    sizes = f"the student has {len(student):,} tokens, the teacher {len(teacher):,}"
    if moved:
        number, token = moved[0]
        example = f"{token!r}: {number} for the student, {teacher[token]} for the teacher"
        return f"{sizes}; {len(moved):,} have different ids, such as {example}"
    number, token = (removed or added)[0]
    example = f"{token!r} ({number}, {'student' if removed else 'teacher'})"
    return f"{sizes}; {len(removed) + len(added):,} exist on one side only, such as {example}"


def name_of(teacher: TeacherConfig) -> str:
    """Return the name of a teacher in reports."""
    return teacher.name or public_name(teacher.model or "teacher")


def fingerprint(teacher: TeacherConfig, dtype: mx.Dtype) -> JsonObject:
    """Return what decides a teacher's logits: hashes of its files, and the dtype.

    Raises:
        SlimError: If the model is not there.
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
