"""YAML of others: bounded in events, values, depth and digits, and plain types only."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.config import library, read
from mlx_slim.config.load import load_recipe
from mlx_slim.config.read import parse_scalar, read_mapping
from mlx_slim.errors import SlimError

_LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (_LAUGHS, "more than 20000 values, those behind aliases included"),
        ("a: &a [*a]", "nested deeper than 64 levels, or an alias of itself"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested deeper"),
        ("".join(" " * n + "a:\n" for n in range(300)), "nested deeper"),
        ("a: [" + "a," * 300_000 + "]", "more than 20,000 values and marks"),
        ("a: " + "x" * (1 << 20), "expected at most 1,048,576"),
        ("a: " + "9" * 6000, "is not of type int"),
        ("a: " + "1_" * 2000 + "1", "an integer of more than 64 digits"),
        ("a: !!int x", "'x' is not of type int"),
        ("a: !!bool x", "'x' is not of type bool"),
        ("a: !!python/object/apply:os.system [ls]", "line 1, column 4: the tag .* is not read"),
        ("a: !mine {b: 1}", "the tag '!mine' is not read here"),
        ("a: !!set {b}", "is not read here"),
        ("a: !!binary aGk=", "is not read here"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: \0", "special characters"),
    ],
)
def test_what_is_no_plain_value_of_a_decent_size_is_one_line(
    tmp_path: Path, text: Any, words: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    start = time.thread_time()
    with pytest.raises(SlimError, match=words) as caught:
        read_mapping(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert time.thread_time() - start < 20  # exponential ones take hours


def test_aliases_of_a_decent_number_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: &x {b: [1, !!str 2]}\nc: *x\n")
    value, lines = read_mapping(path)
    assert value == {"a": {"b": [1, "2"]}, "c": {"b": [1, "2"]}}
    assert lines["c",] == 2


@pytest.mark.parametrize(
    "text", ["[" * 5000, "&a [*a]", "9" * 6000, '"', "!!int x", "\0", "\ud800"]
)
def test_an_override_that_is_no_value_is_one_short_line(text: str) -> None:
    with pytest.raises(SlimError) as caught:
        parse_scalar(text)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [".".join(["a"] * 5000) + "=1", "x" * 100_000, "train.steps=" + "[" * 3000, "a\0b=\0"],
)
def test_an_override_of_any_size_is_one_short_line(override: Any) -> None:
    with pytest.raises(SlimError) as caught:
        load_recipe("smollm2-lora", [override])
    assert len(str(caught.value)) < 1000


def test_recipes_that_are_no_files_are_refused_at_once(tmp_path: Path) -> None:
    fifo, loop, null = tmp_path / "f.yaml", tmp_path / "l.yaml", tmp_path / "z.yaml"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    null.symlink_to("/dev/zero")
    for path, words in ((fifo, "is a FIFO"), (loop, "cannot be read: .*links"), (null, "a device")):
        with pytest.raises(SlimError, match=words):
            load_recipe(str(path))
    for name in ("n" * 5000, f"{'n' * 5000}.yaml", "a\0b.yaml", "a\0b"):
        with pytest.raises(SlimError) as caught:
            load_recipe(name)
        assert len(str(caught.value)) < 1500


def test_recipes_that_extend_many_are_counted(tmp_path: Path) -> None:
    for number in range(30):
        parent = "" if number == 29 else f"extends: [r{number + 1}.yaml, r{number + 1}.yaml]\n"
        (tmp_path / f"r{number}.yaml").write_text(f"{parent}model: x\n")
    with pytest.raises(SlimError, match="extends more than 64 files"):
        load_recipe(str(tmp_path / "r0.yaml"))


def test_both_parsers_read_the_shipped_files_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyYAML's own takes over where it was built without libyaml."""
    files = [
        library.find(kind, name) for kind in ("recipes", "evals") for name in library.names(kind)
    ]
    assert len(files) > 40
    values = [read_mapping(file) for file in files]
    monkeypatch.setattr(read.yaml, "__with_libyaml__", False)
    assert [read_mapping(file) for file in files] == values
