"""Whether two tokenizers are the same: for a student and its teacher, a model and its draft.

Invariant: two tokenizers agree only where each id is the same token on both sides and both encode
texts into the same ids; equal vocabulary sizes do not suffice (Mistral-7B and LLaMA-2 both have
32,000 tokens, and they differ). Try it: ``mlx-slim distill distill-smollm2 --dry-run``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_slim.data.tokenize import unwrap

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


def tokenizer_difference(
    one: Any, other: Any, names: tuple[str, str] = ("student", "teacher")
) -> TokenizerDifference | None:
    """Return how two tokenizers differ, None if they agree.

    Compares the vocabulary maps, the encodings of a probe corpus, and which ids begin, end and
    stand for unknown tokens.

    Args:
        one: mlx-lm's ``TokenizerWrapper``, or a Hugging Face tokenizer.
        other: Likewise.
        names: What both belong to, for the text.
    """
    ours, theirs = unwrap(one), unwrap(other)
    vocabularies = ours.get_vocab(), theirs.get_vocab()
    if vocabularies[0] != vocabularies[1]:
        return TokenizerDifference(_vocabularies(vocabularies, names), encodings=True)
    for probe in PROBES:
        a, b = (list(t.encode(probe, add_special_tokens=False)) for t in (ours, theirs))
        if a != b:
            text = f"{probe[:24]!r} is {a[:6]}… for the {names[0]}, {b[:6]}… for the {names[1]}"
            return TokenizerDifference(text, encodings=True)
    for name in _SPECIAL:
        a, b = (getattr(t, f"{name}_token_id", None) for t in (ours, theirs))
        if a != b:
            tokens = [
                repr(t.convert_ids_to_tokens(i)) if i is not None else "none"
                for t, i in ((ours, a), (theirs, b))
            ]
            text = f"{name} is {tokens[0]} for the {names[0]}, {tokens[1]} for the {names[1]}"
            return TokenizerDifference(text, encodings=False)
    return None


def _vocabularies(both: tuple[dict[str, int], dict[str, int]], names: tuple[str, str]) -> str:
    """Return the first difference of two vocabulary maps as a sentence."""
    one, other = both
    shared = one.keys() & other.keys()
    moved = sorted((one[t], t) for t in shared if one[t] != other[t])
    removed = sorted((one[t], t) for t in one.keys() - other.keys())
    added = sorted((other[t], t) for t in other.keys() - one.keys())
    sizes = f"the {names[0]} has {len(one):,} tokens, the {names[1]} {len(other):,}"
    if moved:
        number, token = moved[0]
        example = f"{token!r}: {number} for the {names[0]}, {other[token]} for the {names[1]}"
        return f"{sizes}; {len(moved):,} have different ids, such as {example}"
    number, token = (removed or added)[0]
    example = f"{token!r} ({number}, {names[0] if removed else names[1]})"
    return f"{sizes}; {len(removed) + len(added):,} exist on one side only, such as {example}"
