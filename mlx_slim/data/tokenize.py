"""Text to token ids, with an exact supervised flag for every token.

Invariant: the ids are the tokenization of the whole text (a long one is read through windows that
are joined where they agree, ``_windows``), BOS stands once, and the last answer ends in EOS. A
token is supervised when its first non-space character lies in an answer: a token that straddles the
border counts for the side that its word is on, whichever way a tokenizer reports offsets
(byte-level ones trim the space, others do not). ``supervised[0]`` is always False: nothing stands
before it to predict it from.

A turn's loss weight is that of its tokens. Legend: T tokens of a row, C characters of its text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from mlx_slim.artifacts import hash_bytes
from mlx_slim.data.rendered import Rendered
from mlx_slim.errors import SlimError

_CHARACTERS = 1 << 20  # tokenized at once
_MARGIN = 1 << 12  # characters that two windows of a long text have in common,
_AGREE = 16  # where so many tokens in a row must be the same
# Whether a character is a space, for every code up to the first behind the last space.
_SPACES = np.array([chr(code).isspace() for code in range(0x3002)])


class Tokens(NamedTuple):
    """One row: ``ids_T`` int32 and ``supervised_T`` bool (token t is learned from ``ids[:t]``).

    ``weights_T`` is the float32 loss weight of each token, 0 where it is not supervised; None is 1
    for all that are.
    """

    ids_T: np.ndarray
    supervised_T: np.ndarray
    weights_T: np.ndarray | None = None


def unwrap(tokenizer: Any) -> Any:
    """Return the Hugging Face tokenizer inside mlx-lm's wrapper (or the tokenizer itself).

    The wrapper injects ``enable_thinking`` into every chat template; training must not.
    """
    inner = getattr(tokenizer, "_tokenizer", None)
    return inner if hasattr(inner, "apply_chat_template") else tokenizer


def embedding_rows(tokenizer: Any) -> int | None:
    """Return the rows of the model's embedding; None if no token lies beyond them.

    ``models/tokenizer.py`` leaves the number with the tokenizer where a model is loaded.
    """
    return getattr(unwrap(tokenizer), "embedding_rows", None)


def check_ids(tokenizer: Any, ids: Sequence[int] | np.ndarray, what: str) -> None:
    """Refuse token ids that the model has no embedding for.

    Args:
        tokenizer: Of the model.
        ids: Of one text.
        what: Names the text.

    Raises:
        SlimError: Names the text, the id and the token.
    """
    rows = embedding_rows(tokenizer)
    if rows is None or not len(ids) or (most := int(np.max(ids))) < rows:
        return
    token = unwrap(tokenizer).convert_ids_to_tokens(most)
    raise SlimError(
        f"{what}: the token {token!r} has the id {most}, the model's embedding has {rows:,} rows",
        "use this model's own tokenizer files, or remove the token from the text",
    )


def check_text(text: str, what: str) -> None:
    """Refuse text that no tokenizer takes, because it holds half of a character.

    Raises:
        SlimError: Names the text and the place in it.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SlimError(
            f"{what}: {text[error.start]!a} at character {error.start + 1} is half of a "
            "character (a lone surrogate)",
            "replace it with the whole character, or remove it",
        ) from error


class RowEncoder:
    """Tokenizes rendered rows.

    Args:
        tokenizer: mlx-lm's ``TokenizerWrapper`` or a fast Hugging Face tokenizer.
        mask_prompt: Supervise answers only; False supervises every token but the first.

    Raises:
        SlimError: If the tokenizer cannot say which characters a token covers.
    """

    def __init__(self, tokenizer: Any, *, mask_prompt: bool) -> None:
        self.tokenizer = unwrap(tokenizer)
        self.mask_prompt = mask_prompt
        if not getattr(self.tokenizer, "is_fast", False):
            raise SlimError(
                f"the tokenizer {type(self.tokenizer).__name__} gives no character offsets, so "
                "answers cannot be told from prompts",
                "use a model with a tokenizer.json",
            )
        self.bos: int | None = self.tokenizer.bos_token_id
        self.eos: int | None = self.tokenizer.eos_token_id
        ends = getattr(tokenizer, "eos_token_ids", None)
        more = [] if ends is None or isinstance(ends, int) else list(ends)
        self.ends = {int(end) for end in [self.eos, *more] if end is not None}
        first = self.tokenizer("a").input_ids
        self.adds_bos = self.bos is not None and bool(first) and first[0] == self.bos

        longest = max(map(len, self.tokenizer.get_vocab()), default=1)
        self.most_characters = 4 * longest  # of a token: four times, for normalizers that shorten

    def fingerprint(self) -> str:
        """Return a hash of the vocabulary, the merges and the special tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        text = backend.to_str() if backend is not None else str(self.tokenizer.get_vocab())
        return hash_bytes(f"{self.bos} {sorted(self.ends)} {text}".encode())

    def encode(self, rows: list[Rendered]) -> list[Tokens]:
        """Tokenize many rows (the library uses every core), some megabytes of text at once."""
        tokens: list[Tokens] = []
        start = 0
        while start < len(rows):
            stop, characters = start, 0
            while stop < len(rows) and (stop == start or characters < _CHARACTERS):
                characters += len(rows[stop].text)
                stop += 1
            tokens += self._encode(rows[start:stop])
            start = stop
        return tokens

    def _encode(self, rows: list[Rendered]) -> list[Tokens]:
        if len(rows) == 1 and len(rows[0].text) > _CHARACTERS + _MARGIN:
            return [self._row(rows[0], *self._windows(rows[0].text))]
        tokenized = self._placed([row.text for row in rows])
        return [self._row(row, *placed) for row, placed in zip(rows, tokenized, strict=True)]

    def _placed(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids of texts, int32 (T,), and the character that each token begins at."""
        tokenized = zip(texts, with_offsets(self.tokenizer, texts), strict=True)
        return [(ids_T, _first_characters(text, at_T2)) for text, (ids_T, at_T2) in tokenized]

    def _windows(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return what ``_placed`` gives for a long text, whose tokens it never holds as objects.

        Neighbouring windows have some characters in common, and are joined where they give the same
        tokens for a while. Where they never do, more is tokenized at once.
        """

        def placed(start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
            ids_T, begin_T = self._placed([text[start : start + size + _MARGIN]])[0]
            return ids_T, begin_T + start

        done: list[tuple[np.ndarray, np.ndarray]] = []
        start, size, joined = 0, _CHARACTERS, 0  # joined: the character that is next
        here = placed(start, size)
        while start + size + _MARGIN < len(text):
            later = placed(start + size, _CHARACTERS)
            joint = _joint(here, later)
            if joint is None:
                size *= 2
                here = placed(start, size)
                continue
            begin_T = here[1]
            span = (begin_T >= joined) & (begin_T < joint)
            done.append((here[0][span], begin_T[span]))
            start, size, joined, here = start + size, _CHARACTERS, joint, later
        rest = here[1] >= joined
        done.append((here[0][rest], here[1][rest]))
        ids, begins = zip(*done, strict=True)
        return np.concatenate(ids), np.concatenate(begins)

    def _row(self, row: Rendered, ids_T: np.ndarray, begin_T: np.ndarray) -> Tokens:
        weights_T = np.full(len(ids_T), 0.0 if self.mask_prompt else 1.0, np.float32)
        if (self.mask_prompt or row.weights) and len(ids_T):
            for start, end, weight in row.weighted:
                weights_T[(begin_T >= start) & (begin_T < end)] = weight
        if self.adds_bos and not row.has_bos and (not len(ids_T) or ids_T[0] != self.bos):
            ids_T = np.insert(ids_T, 0, np.int32(self.bos or 0))
            weights_T = np.insert(weights_T, 0, np.float32(0))
        if self.eos is not None and not self._closed(row.text, ids_T):
            ids_T = np.append(ids_T, np.int32(self.eos))
            closing = row.weights[-1] if row.weights else 1.0
            weights_T = np.append(weights_T, np.float32(closing))
        weights_T[:1] = 0
        supervised_T = weights_T > 0
        plain = bool((weights_T[supervised_T] == 1).all())
        return Tokens(ids_T, supervised_T, None if plain else weights_T)

    def _closed(self, text: str, ids_T: np.ndarray) -> bool:
        """Whether the row ends in an EOS, white space after it allowed (ChatML's newline)."""
        trailing = len(text) - len(text.rstrip())
        tail = ids_T[-(trailing + 1) :].tolist()  # white space is at most a token a character
        for token in reversed(tail):
            if token in self.ends:
                return True
            if self.tokenizer.decode([token]).strip():
                return False
        return False


def _joint(here: tuple[np.ndarray, np.ndarray], later: tuple[np.ndarray, np.ndarray]) -> int | None:
    """Return the character from which on two windows have the same tokens; None if there is none.

    Args:
        here: Ids of the first window and the character that each begins at; the last tokens may be
            those of a cut word.
        later: The same of the second window, whose first tokens may be.
    """
    ids_T, begin_T = here
    later_T, later_begin_T = later
    first: dict[int, int] = {}  # token that is the first of a character
    for number in range(int(np.searchsorted(begin_T, later_begin_T[0])), len(ids_T)):
        first.setdefault(int(begin_T[number]), number)
    for number in range(1, len(later_T) - _AGREE):
        begin = int(later_begin_T[number])
        other = first.get(begin)
        if other is None or later_begin_T[number - 1] == begin:
            continue
        if other + 2 * _AGREE > len(ids_T):
            return None
        a, b = slice(other, other + _AGREE), slice(number, number + _AGREE)
        same = ids_T[a] == later_T[b], begin_T[a] == later_begin_T[b]
        if np.logical_and(*same).all():
            return begin
    return None


def with_offsets(tokenizer: Any, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids int32 (T,) of each text, and start and end character of each token (T, 2), int64.

    Args:
        tokenizer: A fast one of transformers.
        texts: Tokenized as they are: no special tokens are added, nothing is cut.
    """
    batch = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        verbose=False,
    )
    for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True):
        flat = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets))
        yield np.asarray(ids, np.int32), flat.reshape(-1, 2)


def _first_characters(text: str, offsets_T2: np.ndarray) -> np.ndarray:
    """Return the character that each token begins at, its leading space aside.

    Args:
        text: The text that was tokenized.
        offsets_T2: Start and end character of each token. Byte-level tokenizers trim spaces, which
            leaves a token of spaces empty at its end: it begins where the one before it ended.
    """
    start_T, end_T = offsets_T2[:, 0], offsets_T2[:, 1]
    before_T = np.concatenate([[0], np.maximum.accumulate(end_T)[:-1]])
    begin_T = np.where(start_T == end_T, np.minimum(before_T, start_T), start_T)
    word_T = _next_words(text)[start_T]
    return np.where((start_T < end_T) & (word_T < end_T), word_T, begin_T)


def _next_words(text: str) -> np.ndarray:
    """Return, for each character and the end, where the next one stands that is no space."""
    codes_C = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    space_C = _SPACES[np.minimum(codes_C, len(_SPACES) - 1)]
    word_C = np.where(space_C, len(text), np.arange(len(text)))
    return np.append(np.minimum.accumulate(word_C[::-1])[::-1], len(text))
