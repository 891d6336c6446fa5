"""Slow tests are listed, each part of them is run by somebody, and none is left out unsaid."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import slow

ROOT = Path(__file__).resolve().parents[1]


def test_every_line_names_a_test() -> None:
    names = slow.functions()
    assert names == sorted(set(names))
    by_file: dict[str, set[str]] = {}
    for name in names:
        file, _, function = name.partition("::")
        if file not in by_file:
            module = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            by_file[file] = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
        assert function in by_file[file], name


@pytest.mark.parametrize("count", [1, 3, 8])
def test_parts_are_disjoint_and_together_all(count: int) -> None:
    names = slow.functions()
    slices = [slow.choose(names, f"{part}/{count}") for part in range(1, count + 1)]
    assert sorted(name for part in slices for name in part) == names
    assert slow.choose(names, "all") == set(names)
    assert slow.choose(names, "none") == set()


@pytest.mark.parametrize("selection", ["", "some", "0/8", "9/8", "1/0", "1/8/2", "-1/8", "１/8"])
def test_what_is_no_part_is_refused(selection: str) -> None:
    with pytest.raises(pytest.UsageError, match="expected none, all, or K/N"):
        slow.choose(["a"], selection)


def _run(*words: str, selection: str = "none") -> tuple[list[str], set[str]]:
    """Return the tests that a run takes of four, and what it says that it leaves out."""
    deselected: list[Any] = []
    config: Any = SimpleNamespace(
        args=list(words),
        getoption=lambda _: selection,
        hook=SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items)),
    )
    one = slow.functions()[0]
    names = [one, f"{one}[a]", f"{one}_too", "tests/test_slow.py::test_every_line_names_a_test"]
    items: list[Any] = [SimpleNamespace(nodeid=name) for name in names]
    slow.split(config, items)
    assert len(deselected) + len(items) == len(names)
    return [item.nodeid for item in items], slow.left_out(config)


def test_a_run_leaves_out_what_it_says_and_never_what_is_named() -> None:
    names, left_out = _run("tests")
    assert len(names) == 2 and left_out == set(slow.functions())
    assert len(_run("tests", selection="all")[0]) == 4 and not _run("tests", selection="all")[1]
    names, left_out = _run(slow.functions()[0])
    assert len(names) == 4 and not left_out
