"""Stop strings: an answer ends where its text has one, whatever tokens spell it.

Invariant: the text before the first stop is given in full and nothing after it, in a stream too;
what an answer holds back when it ends by itself is given. mlx-lm's server ends only at a stop's
tokens as the tokenizer encodes it alone: spelled otherwise, the stop is cut out of the middle of
the answer, and at every stop what the detokenizer holds is lost. Used by ``serving/generator.py``.
Try it: ``python -m pytest tests/serving/test_stops.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace

from mlx_lm.server import Response


def until_stop(
    responses: Iterable[Response],
    stops: Sequence[str],
    end_tokens: Container[int],
    decode: Callable[[int], str],
) -> Iterator[Response]:
    """Yield the tokens of an answer until its text has a stop.

    The last response of an answer that was stopped has no ``finish_reason``: mlx-lm's handler drops
    the text of one that says ``stop``, and takes the end of the responses for the same.

    Args:
        responses: Of mlx-lm's server; the text of a token may come with a later one.
        stops: Texts, none of them empty.
        end_tokens: Ids that end an answer by themselves and have no text.
        decode: Returns the text of a token.
    """
    held = ""  # what may be the beginning of a stop
    for response in responses:
        text = held + response.text
        cut = _first(text, stops)
        if cut is None and response.finish_reason == "stop":
            cut = len(text)
            if response.token not in end_tokens:  # the last token of a stop, whose text is missing
                cut = _first(text + decode(response.token), stops)
                cut = len(text) - _begun(text, stops) if cut is None else cut
        if cut is not None:
            yield replace(response, text=text[:cut], finish_reason=None)
            return
        shown = len(text) if response.finish_reason else len(text) - _begun(text, stops)
        held = text[shown:]
        yield replace(response, text=text[:shown])


def _first(text: str, stops: Sequence[str]) -> int | None:
    """Return where the stop begins that is complete first: it ends the answer."""
    places = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(places)[1] if places else None


def _begun(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of ``text`` that a stop begins with."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in stops)), 0)
