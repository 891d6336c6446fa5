"""Files of others: what is refused, in one line that names file and key, and what is not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.artifacts import read_records
from mlx_slim.errors import SlimError
from mlx_slim.reading import (
    MAX_DEPTH,
    check_depth,
    exists,
    field,
    library_errors,
    open_regular,
    parse_json,
    read_json,
    read_object,
    read_text,
)


def refusal(call: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(SlimError) as caught:
        call(*arguments, **named)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text


# ------------------------------ files


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """A FIFO without a writer is refused at once: opening it in the plain way never returns."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("absent")
    assert "is a FIFO" in refusal(open_regular, tmp_path / "fifo")
    assert "is a folder" in refusal(open_regular, tmp_path)
    assert "is a device" in refusal(open_regular, Path("/dev/null"))
    assert "links" in refusal(open_regular, tmp_path / "loop")
    assert "does not exist" in refusal(open_regular, tmp_path / "nowhere")
    assert "5," in refusal(open_regular, tmp_path / ("a" * 5000))
    assert "null" in refusal(open_regular, Path("a\0b"))
    with pytest.raises(SlimError, match="FIFO"):
        list(read_records(tmp_path / "fifo"))


def test_a_path_that_cannot_be_followed(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert exists(tmp_path)
    assert not exists(tmp_path / "no" / "such")
    assert "5," in refusal(exists, tmp_path / ("a" * 5000))
    assert "links" in refusal(exists, tmp_path / "loop")


def test_a_file_that_is_too_large_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"ab\xff")
    assert "3 bytes, expected at most 2" in refusal(read_text, tmp_path / "file", 2)
    assert "not UTF-8" in refusal(read_text, tmp_path / "file")


# ------------------------------ JSON


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (nested(MAX_DEPTH + 1), "nested deeper than 64"),
        (nested(200_000), "nested deeper than 64"),
        ('{"a": ' * 3000 + "1" + "}" * 3000, "nested deeper than 64"),
        (f'{{"a": {"9" * 6000}}}', "6,000 digits"),
        ('{"a": "\\ud83d"}', "\\ud83d is half of a character"),
        ('{"a": 1', "cannot be read as JSON"),
        (b'{"a": "\xff"}', "cannot be read as JSON"),
        (b'{"a": "\xed\xa0\x80"}', "cannot be read as JSON"),
    ],
)
def test_hostile_json(text: Any, expected: str) -> None:
    actual = refusal(parse_json, text, "config.json")
    assert actual.startswith("config.json")
    assert expected in actual


def test_json_within_bounds() -> None:
    assert parse_json(nested(MAX_DEPTH), "x") == json.loads(nested(MAX_DEPTH))
    assert parse_json('{"a": 1000000000000000019884624838656, "b": "\\ud83d\\ude42"}', "x") == {
        "a": 1000000000000000019884624838656,
        "b": "🙂",
    }
    assert parse_json('"[[[' + "[" * 100 + '"', "x") == "[[[" + "[" * 100
    assert parse_json('"\\ud83d"', "x", halves=True) == "\ud83d"
    assert parse_json('{"a": 1, "a": 2}', "x") == {"a": 2}
    assert "'a' twice" in refusal(parse_json, '{"a": 1, "a": 2}', "x", unique=True)


def test_the_depth_of_values_from_another_parser() -> None:
    value: list = []
    for _ in range(100_000):
        value = [value]
    assert "nested deeper than 5" in refusal(check_depth, value, "rows.yaml", 5)
    check_depth({"a": [1, {"b": []}]}, "rows.yaml", 4)
    assert "deeper" in refusal(check_depth, {"a": [1, {"b": []}]}, "rows.yaml", 3)


def test_an_object_with_keys(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text('{"recipe": [], "step": 3}')
    assert read_object(file, step=int)["step"] == 3
    assert "run.json: recipe is [], expected an object" in refusal(read_object, file, recipe=dict)
    assert "run.json has no 'data'" in refusal(read_object, file, data=dict)
    file.write_text("[]")
    assert "is not a JSON object" in refusal(read_object, file)
    with pytest.raises(SlimError, match="does not exist"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, True, "a whole number"),
        (int, 3.0, "a whole number"),
        (int, 0, "from 1 to 8"),
        (int, 9, "from 1 to 8"),
        (float, float("nan"), "a number"),
        (float, float("inf"), "a number"),
        (float, "1", "a number"),
        (str, None, "a string"),
        (list, {}, "a list"),
        (dict, [], "an object"),
    ],
)
def test_a_field_of_another_type_or_out_of_range(kind: Any, value: Any, expected: str) -> None:
    bounds = {"low": 1, "high": 8} if kind in (int, float) else {}
    actual = refusal(field, {"rank": value}, "a.json", "rank", kind, **bounds)
    assert "a.json: rank is" in actual
    assert expected in actual


def test_a_field_that_fits() -> None:
    assert field({"r": 8}, "x", "r", float, low=1, high=8) == 8
    assert field({}, "x", "r", int, 4) == 4
    assert field({"r": None}, "x", "r", int, 4) == 4
    assert field({"r": "x" * 9}, "x", "r", str, high=9) == "x" * 9
    assert field({"r": [1, 2.5]}, "x", "r", list, of=float) == [1, 2.5]
    actual = refusal(field, {"r": ["a", 1]}, "x", "r", list, of=str)
    assert "x: r[1] is 1, expected a string" in actual
    actual = refusal(field, {"r": {"a": "b", "c": None}}, "x", "r", dict, of=str)
    assert "x: r['c'] is None, expected a string" in actual
    actual = refusal(field, {"r": 1.0}, "x", "r", float, low=0, below=1)
    assert "r is 1.0, expected a number from 0 to below 1" in actual
    assert "has no 'r'" in refusal(field, {}, "x", "r", int)


def test_what_a_library_raises() -> None:
    class PanicException(BaseException):
        pass

    for error in (KeyError("x"), RecursionError("deep"), PanicException("out\nof range")):
        with (
            pytest.raises(SlimError, match=r"^a\.json cannot be used: ") as caught,
            library_errors("a.json cannot be used"),
        ):
            raise error
        assert "\n" not in str(caught.value)
    with pytest.raises(SlimError, match="as it is"), library_errors("a.json"):
        raise SlimError("as it is")
    with pytest.raises(KeyboardInterrupt), library_errors("a.json"):
        raise KeyboardInterrupt
