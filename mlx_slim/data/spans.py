r"""Find the characters of a rendered conversation that are an answer, by comparing renderings.

Invariant: a span begins where the model takes over from the prompt and ends behind what closes the
turn; it is read off renderings, never searched for by its text. Used by ``chat_template.py``:

    prompt … H①i<|im_end|>\n<|im_start|>assistant\n            messages before the turn, prompted
    whole  … H①i<|im_end|>\n<|im_start|>assistant\n②Hello③<|im_end|>\n …
                                                   [ begins where ``prompt`` ends, counted from ①

Only what stands between two turns is compared, so a template may rewrite earlier ones (cut their
thoughts, move the system message). Where the prompt does not come out that way, a turn begins with
its own text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from mlx_slim.data.marks import TAG, Kind, MarkedChat, Messages, Placement
from mlx_slim.errors import SlimError

_NEWLINES = re.compile(r"\n*")


def unclear(turn: int) -> SlimError:
    """Return the refusal of a row whose turn (from 0) has no certain borders."""
    return SlimError(
        f"the chat template changes the text before turn {turn + 1}, "
        "so the answer cannot be told from the prompt",
        "use a template with {% generation %} marks, or data.template=chatml",
    )


@dataclass(frozen=True)
class Borders:
    """Finds the spans of one conversation.

    Attributes:
        chat: The conversation with marks.
        whole: Its rendering.
        render: Marked messages, and whether to prompt → their rendering, None if it is refused.
        eos_texts: Texts of the tokens that may close a turn.
    """

    chat: MarkedChat
    whole: Placement
    render: Callable[[Messages, bool], str | None]
    eos_texts: list[str]

    def span(self, turn: int) -> tuple[int, int]:
        """Return where a turn of the assistant begins and ends.

        Raises:
            SlimError: If that is not certain.
        """
        start = self._taken_over(turn)
        if start is None:
            start = self._text_start(turn)
        end = self._end(turn)
        if start is None or end is None or start >= end:
            raise unclear(turn)
        return start, end

    def comes_out(self, turn: int) -> bool:
        """Return whether any mark of a turn is in the text."""
        return bool(self.whole.of(turn))

    def text_comes_out(self, turn: int) -> bool:
        """Return whether any text of an answer is in the text, besides its calls."""
        return bool(self.whole.of(turn, Kind.BEGIN, Kind.END))

    def _rendered_prompt(self, turn: int, prompt: bool) -> tuple[int, str] | None:
        """Return what the messages before a turn render, from the last mark that the whole has.

        That is the mark's place in the whole text, and what follows it in the rendering.
        """
        rendered = self.render(self.chat.messages[:turn], prompt) if turn else None
        placed = None if rendered is None else self.chat.placed(rendered)
        if placed is None:
            return None
        common = [number for number in placed.places if number in self.whole.places]
        if not common:
            return 0, placed.text
        last = max(common, key=placed.places.__getitem__)
        return self.whole.places[last], placed.text[placed.places[last] :]

    def _taken_over(self, turn: int) -> int | None:
        """Return where the prompt for a turn ends in the whole text, None if it is not in it."""
        prompt, marks_of_turn = self._rendered_prompt(turn, True), self.whole.of(turn)
        if (
            prompt is None
            or not marks_of_turn
            or not self.whole.text.startswith(prompt[1], prompt[0])
        ):
            return None
        start = prompt[0] + len(prompt[1])
        for number, at in self.whole.places.items():
            if start <= at < marks_of_turn[-1] and self.chat.marks[number].turn != turn:
                return None  # such as a system message that stands in this turn
        return start

    def _text_start(self, turn: int) -> int | None:
        """Return where a turn's text begins; for calls alone, where a text would stand."""
        begin = self.whole.of(turn, Kind.BEGIN)
        if begin or self.whole.of(turn, Kind.END):
            first = self.whole.of(turn)[0]
            return first if begin and begin[0] == first else None
        output = self.render(self.chat.probe(turn), False)
        probed = None if output is None else self.chat.placed(output)
        if probed is None:
            return None
        calls, places = probed.of(turn, Kind.CALL), probed.of(turn, Kind.PROBE)
        if places and calls and places[0] <= calls[0]:
            same = self.whole.text.startswith(probed.text[: places[0]])
            return places[0] if same else None
        return self._where_prompt_differs(turn)

    def _where_prompt_differs(self, turn: int) -> int | None:
        """Return where a turn and the prompt for it part, at a tag of either, behind its head."""
        prompt, bare = self._rendered_prompt(turn, True), self._rendered_prompt(turn, False)
        if prompt is None or bare is None or prompt[0] != bare[0]:
            return None
        at, rest = prompt
        here = self.whole.text[at:]
        apart = (i for i, (a, b) in enumerate(zip(rest, here, strict=False)) if a != b)
        same = next(apart, min(len(rest), len(here)))
        for text in (rest, here):
            cut = [m.start() for m in TAG.finditer(text) if m.start() < same < m.end()]
            same = min([same, *cut])
        marks_of_turn = self.whole.of(turn)
        sure = (
            rest.startswith(bare[1])
            and len(bare[1]) < same
            and marks_of_turn
            and at + same < marks_of_turn[0]
        )
        return at + same if sure else None

    def _end(self, turn: int) -> int | None:
        """Return where a turn's closing ends: a token that ends turns, else what follows alone."""
        marks = self.whole.of(turn)
        if not marks:
            return None
        text, last = self.whole.text, marks[-1]
        later = [
            at for number, at in self.whole.places.items() if self.chat.marks[number].turn > turn
        ]
        limit = min(later, default=len(text))
        if limit < last:
            return None
        closed = [
            at + len(eos) for eos in self.eos_texts if (at := text.find(eos, last, limit)) >= 0
        ]
        if closed:
            return behind_newlines(text, min(closed))
        if turn == len(self.chat.messages) - 1:
            return len(text)
        alone = self.render(self.chat.messages[: turn + 1], False)
        through = None if alone is None else self.chat.placed(alone)
        if through is not None and through.of(turn):
            tail = through.text[through.of(turn)[-1] :]
            if text.startswith(tail, last) and last + len(tail) <= limit:
                return last + len(tail)
        return last if self.whole.of(turn, Kind.END)[-1:] == [last] else None


def behind_newlines(text: str, end: int) -> int:
    """Return the end of the newlines that stand at ``end``."""
    match = _NEWLINES.match(text, end)
    return match.end() if match else end
