"""Stop strings: the text before the first one, whatever tokens spell it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from mlx_lm.server import Response

from mlx_slim.serving.stops import until_stop
from tests.serving.conftest import Running

END = 0


def answer(
    pieces: Sequence[str], stops: Sequence[str], reason: str = "length", last: int = 1
) -> str:
    """Return the text of an answer of ``pieces``; the last one has ``reason``."""
    responses = [Response(piece, 1, 0.0, None, ({},)) for piece in pieces]
    responses[-1].finish_reason, responses[-1].token = reason, last
    stopped = list(until_stop(responses, stops, {END}, lambda token: "d" if token == 3 else ""))
    assert all(one.text == "" for one in stopped if one.finish_reason == "stop")
    return "".join(one.text for one in stopped)


def test_a_stop_ends_the_answer_whatever_tokens_spell_it() -> None:
    assert answer(["one tw", "o thr", "ee"], ["wo t"]) == "one t"
    assert answer(["a", "b", "c"], ["bd"]) == "abc"
    assert answer(["a", "b", "c"], ["abd", "c"]) == "ab"
    assert answer(["ab", "cd"], []) == "abcd"


def test_what_is_held_is_given_where_the_answer_ends_by_itself() -> None:
    assert answer(["a", "b"], ["bc"]) == "ab"
    assert answer(["a", "b", " "], ["b c"], "stop", END) == "ab "


def test_the_last_token_of_a_stop_comes_without_its_text() -> None:
    assert answer(["a", "b c", ""], ["cd"], "stop", 3) == "ab "
    assert answer(["a", "b c", " "], ["x", "c d"], "stop", 3) == "ab "
    assert answer(["a", "b", ""], ["bd"], "stop", 4) == "a"  # the tokens of one have another text


def test_any_pieces_of_any_text() -> None:
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices("ab", k=draw.randint(1, 12)))
        stops = ["".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(2)]
        cuts = sorted(draw.choices(range(len(text) + 1), k=4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        expected = text[: min(ends)[1]] if ends else text
        assert answer(pieces, stops) == expected, (text, stops, pieces)


def test_the_server_stops_in_the_middle_of_what_the_tokenizer_holds_back(running: Running) -> None:
    prompt = {"model": running.model, "prompt": "once upon", "max_tokens": 24}

    def complete(**body: object) -> tuple[str, str]:
        data = json.dumps({**prompt, **body}).encode()
        status, record = running.send("/v1/completions", data)
        assert status == 200
        if not body.get("stream"):
            (choice,) = json.loads(record)["choices"]
            return choice["text"], choice["finish_reason"]
        lines = [line[6:] for line in record.decode().split("\n") if line.startswith("data: {")]
        choices = [json.loads(line)["choices"][0] for line in lines]
        return "".join(one["text"] for one in choices), choices[-1]["finish_reason"]

    whole, reason = complete()
    assert reason == "length" and len(whole) > 12
    for start, length in ((1, 1), (4, 2), (9, 3)):
        stop = whole[start : start + length]
        before = whole[: whole.find(stop)]
        for more in ({}, {"stream": True}, {"seed": 1}):  # a seed is answered alone
            assert complete(stop=stop, **more) == (before, "stop"), (stop, more)
