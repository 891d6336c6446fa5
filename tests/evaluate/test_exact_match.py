"""Exact match: the strict figure, the JSON figure, and what is written down."""

from __future__ import annotations

import json

from mlx_slim.evaluate.exact_match import score, write_samples
from mlx_slim.evaluate.generate import Generation


def _answers(*texts: str) -> list[Generation]:
    return [Generation(text, [], "eos") for text in texts]


def test_strict_and_json_figures():
    target = '{"a":"1","b":null}'
    texts = (target, f" {target}\n", '{"b": null, "a": "1"}', '{"a":1,"b":null}', "sorry", "")
    result = score(_answers(*texts), [target] * 6)
    assert [s["exact_match"] for s in result.samples] == [1, 1, 0, 0, 0, 0]
    assert [s["json_match"] for s in result.samples] == [1, 1, 1, 0, 0, 0]
    assert (result.n, result.exact, result.same_json) == (6, 2, 3)
    assert result.rate == 2 / 6


def test_text_that_is_no_json_never_matches_as_json():
    result = score(_answers("yes"), ["yes"])
    assert (result.exact, result.same_json) == (1, 0)
    assert score([], []).rate == 0.0


def test_deeply_nested_text_is_just_wrong():
    assert score(_answers("[" * 100_000), ["[]"]).same_json == 0


def test_samples_are_one_line_a_row(tmp_path):
    result = score(_answers("a\nb", "ü"), ["a\nb", "u"])
    write_samples(tmp_path / "samples_demo.jsonl", result)
    lines = (tmp_path / "samples_demo.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == result.samples
    assert "ü" in lines[1]
