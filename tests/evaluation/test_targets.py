"""What is right: places and texts, lists of them, and what may mean two answers."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_slim.evaluation.targets import read_choices, right_places, right_texts

WORDS, NUMBERS = ["red", "blue", "green"], ["1", "2", "4"]


@pytest.mark.parametrize(
    ("value", "choices", "places"),
    [
        (2, WORDS, (2,)),
        ("2", WORDS, (2,)),
        ("blue", WORDS, (1,)),
        ([0, 2], WORDS, (0, 2)),
        (["green", "red", 2, "0"], WORDS, (2, 0)),
        (("blue",), WORDS, (1,)),
        (2, NUMBERS, (2,)),  # a number is a place, whatever the choices are
        ("1", ["0", "1", "2"], (1,)),  # both readings are one choice
        ("1.5", ["0.5", "1.5"], (1,)),
        ("-1", ["-1", "1"], (0,)),
    ],
)
def test_places(value: Any, choices: Any, places: Any) -> None:
    assert right_places(value, choices) == places


@pytest.mark.parametrize(
    ("value", "choices"),
    [
        ("2", NUMBERS),  # "2", or the third
        ("0", NUMBERS),  # the first, though no choice is written so
        ("4", NUMBERS),  # "4", though there is no fifth
        (["4", "1"], NUMBERS),
        ("1", ["1", "none"]),
        ("2", ["1.5", "2.5", "3.5"]),
        ("1", ["1,000", " 2 "]),
        ("02", ["01", "02"]),
        ("1914", ["1912", "1914"]),
        ("9" * 6000, ["9" * 6000, "nine"]),
    ],
)
def test_digits_beside_numbers_are_ambiguous(value: Any, choices: Any) -> None:
    with pytest.raises(ValueError, match=r"is ambiguous: the choices .* place_in .* int "):
        right_places(value, choices)


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ([], "an empty list"),
        ([0, "pink"], "'pink': expected a choice"),
        ([None], "None: expected a choice"),
        (["red", 3], "3: expected a choice, or its place from 0 to 2"),
        ("3", "'3': expected a choice"),
        ("9" * 6000, "'999"),
        ("٣", "'٣'"),
        ([0, [1]], r"\[1\]"),
        ("[0, 1]", r"'\[0, 1\]'"),  # a text that looks like a list is a text
        ({"text": "red"}, "{'text'"),
    ],
)
def test_what_is_no_choice_is_named(value: Any, seen: str) -> None:
    with pytest.raises(ValueError, match=f"the target is {seen}") as caught:
        right_places(value, WORDS)
    assert len(str(caught.value)) < 200


def test_texts() -> None:
    assert right_texts("Paris") == ("Paris",)
    assert right_texts(18) == ("18",)
    assert right_texts(["Paris", "paris", "Paris", 3.5]) == ("Paris", "paris", "3.5")
    assert right_texts("['a', 'b']") == ("['a', 'b']",)
    assert right_texts(['{"a": 1}', "[1]"], as_json=True) == ('{"a": 1}', "[1]")
    for bad in (None, [None], ["a", ["b"]], {"text": ["a"]}, [{}]):
        with pytest.raises(ValueError, match="expected a text, or a list of texts"):
            right_texts(bad)
    with pytest.raises(ValueError, match="an empty list: expected at least one"):
        right_texts([])
    with pytest.raises(ValueError, match=r"the target is \[1, 2\]: .*tojson"):
        right_texts([1, 2], as_json=True)


def test_choices_are_texts_and_numbers() -> None:
    assert read_choices(["a ", 2, 2.5, True, "…"]) == ["a ", "2", "2.5", "True", "…"]
    for bad in (None, ["a"], {}):
        with pytest.raises(ValueError, match=r"choice 2 of 2 is .*: expected a text or a number"):
            read_choices(["a", bad])
