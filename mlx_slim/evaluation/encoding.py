r"""Token ids of texts with common prefixes, each of which is encoded once.

Invariant: the ids are those of the whole text. A text is cut only between a line feed and a letter,
and only for tokenizers none of whose tokens holds a line feed before a letter: no merge and no
piece crosses such a cut, so both sides are encoded as they are within the text. The left side is
taken from the previous text, which has the same letter after the cut; the right side is encoded
with its line feed, whose ids are dropped. Other tokenizers, and texts without a cut, are encoded
whole.
Try it: ``mlx-slim eval MODEL --task mmlu --limit 5 -o OUT``.

    before  Question: …\n|Answer: Paris
    text    Question: …\n|Answer: Rome      encoded: "\nAnswer: Rome", without the ids of "\n"
"""

from __future__ import annotations

import re
from string import ascii_letters
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# A token that a cut would divide; byte-level vocabularies write a line feed as "Ċ".
_DIVIDED = re.compile(r"[\nĊ][A-Za-z]")
_WORTH = 64  # characters: a shorter shared prefix is encoded again


class PrefixEncoder:
    """Encodes texts one after the other.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._fronts: dict[bool, int] = {}  # special -> number of ids that a line feed takes
        if _divides_nothing(tokenizer):
            for special in (False, True):
                if (front := self._front(special)) is not None:
                    self._fronts[special] = front
        self._before: tuple[str, bool, list[int]] = ("", False, [])
        self._cut: tuple[int, int] = (
            0,
            0,
        )  # place in the previous text, and the number of ids before it

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the ids of ``text``.

        Args:
            text: Any text.
            special: Whether the tokenizer adds its special tokens.
        """
        ids = self._extended(text, special)
        if ids is None:
            ids, self._cut = self._whole(text, special), (0, 0)
        self._before = (text, special, ids)
        return ids

    def _extended(self, text: str, special: bool) -> list[int] | None:
        """Return the ids of ``text`` from those of the previous text; None if they share no cut."""
        before, as_before, before_ids = self._before
        if special not in self._fronts or special != as_before:
            return None
        place = _last_cut(text, _shared_length(text, before))
        if place < _WORTH:
            return None
        if place != self._cut[0]:
            right = self._right(before, place, special)
            left = len(before_ids) - len(right)
            if before_ids[left:] != right:
                return None
            self._cut = (place, left)
        return before_ids[: self._cut[1]] + self._right(text, place, special)

    def _right(self, text: str, place: int, special: bool) -> list[int]:
        return self._whole(text[place - 1 :], special)[self._fronts[special] :]

    def _whole(self, text: str, special: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=special, verbose=False))

    def _front(self, special: bool) -> int | None:
        """Return how many ids a line feed has before what follows it; None if letters change it."""
        alone = self._whole("\n", special)
        counts = {len(alone) - self._closing(alone, special, letter) for letter in ascii_letters}
        return counts.pop() if len(counts) == 1 and min(counts) > 0 else None

    def _closing(self, alone: list[int], special: bool, letter: str) -> int:
        """Return how many ids of ``alone`` follow a letter behind it; all of them if it changes."""
        ids = self._whole("\n" + letter, special)
        same = _shared_length(ids, alone)
        return len(alone) - same if ids[same + 1 :] == alone[same:] else len(alone)


def _divides_nothing(tokenizer: TokenizerWrapper) -> bool:
    """Return whether no token holds a line feed before a letter, or begins where a cut may be."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    begins = any(str(token)[:1] in ascii_letters for token in added if str(token))
    return not begins and not _DIVIDED.search("\0".join(tokenizer.get_vocab()))


def _last_cut(text: str, shared: int) -> int:
    """Return the place of the last cut whose letter is shared too; 0 if there is none."""
    place = max(0, shared - 1)
    while (place := text.rfind("\n", 0, place)) >= 0:
        if text[place + 1] in ascii_letters:
            return place + 1
    return 0


def _shared_length(one: str | list[int], other: str | list[int]) -> int:
    """Return how many leading items two sequences share, by bisection."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
