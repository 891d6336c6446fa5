"""A tokenizer that was rebuilt from a GGUF file, held against the file's own tables.

Invariant: what passes has the file's vocabulary, finds its control tokens in a text, and cuts texts
full of traps as the tables say when they are followed step by step, as llama.cpp does: join the
best pair of neighbours until no pair is a token. Used by ``gguf_tokenizer.build_tokenizer``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from mlx_slim.errors import SlimError
from mlx_slim.models.tokenizer import PROBES

_HINT = "convert the original Hugging Face folder instead"
_MOST_CONTROLS = 512  # of the control tokens are looked for in a text


def check_rebuilt(
    fast: Any, tokens: Sequence[str], controls: Sequence[int], best: Callable[[str, str], Any]
) -> None:
    """Refuse a tokenizer that does not do what its tables say.

    Args:
        fast: The rebuilt tokenizer.
        tokens: The file's vocabulary.
        controls: Ids of its control tokens.
        best: (left, right) -> how early the pair is joined (the least first), None for never.

    Raises:
        SlimError: Names the first difference.
    """
    first = {token: index for index, token in reversed(list(enumerate(tokens)))}
    vocabulary = fast.get_vocab()
    for token, index in vocabulary.items():
        if not (index < len(tokens) and tokens[index] == token):
            there = repr(tokens[index]) if index < len(tokens) else "none"
            raise _differs(f"the id {index} is {token!r}, in the file {there}")
    if len(vocabulary) != len(first):
        lost = next(token for token in first if token not in vocabulary)
        raise _differs(f"the token {lost!r} is lost")
    for index in controls[:_MOST_CONTROLS]:
        token = tokens[index]
        if fast.encode(token, add_special_tokens=False) != [vocabulary[token]]:
            raise _differs(f"the control token {token!r} is cut into pieces")
    added = fast.get_added_vocab()
    for text in PROBES:
        if any(token in text for token in added):
            continue  # found before anything is joined: the tables alone do not say it
        ids = fast.encode(text, add_special_tokens=False)
        expected = _by_hand(fast, vocabulary, text, best)
        got = fast.convert_ids_to_tokens(ids)
        if got != expected:
            at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), 0)
            raise _differs(f"{text[:20]!r}… is {got[at : at + 4]}, by the file's tables "
                           f"{expected[at : at + 4]}")  # fmt: skip


def _differs(what: str) -> SlimError:
    return SlimError(f"the tokenizer cannot be rebuilt from the GGUF file: {what}", _HINT)


def _by_hand(
    fast: Any, vocabulary: dict[str, int], text: str, best: Callable[[str, str], Any]
) -> list[str]:
    """Return the pieces of a text, joined pair by pair."""
    backend = fast.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text] if text else []
    if backend.pre_tokenizer is not None:
        words = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    pieces: list[str] = []
    for part in words:
        whole = backend.model.ignore_merges and part in vocabulary
        for piece in [part] if whole else _joined(list(part), best):
            ranked = piece in vocabulary
            pieces += [piece] if ranked else [f"<0x{byte:02X}>" for byte in piece.encode()]
    return pieces


def _joined(symbols: list[str], best: Callable[[str, str], Any]) -> list[str]:
    """Join the best pair of neighbours, the leftmost first, until none is left."""
    while True:
        ranks = [best(left, right) for left, right in pairwise(symbols)]
        ranked = [(rank, at) for at, rank in enumerate(ranks) if rank is not None]
        if not ranked:
            return symbols
        at = min(ranked)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
