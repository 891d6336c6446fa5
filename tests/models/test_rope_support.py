"""The table of RoPE support is that of the installed mlx-lm."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import mlx_lm.models
import pytest
from mlx_lm.models import rope_utils

from mlx_slim.models.normalize import HEAD_BY_FILE, architectures
from mlx_slim.models.rope import TYPES
from mlx_slim.models.rope_support import SHARED_TYPES, SUPPORT, RopeSupport, support_of

FOLDER = Path(next(iter(mlx_lm.models.__path__)))


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))


def imported(name: str) -> set[str]:
    """Return a module and those of ``mlx_lm.models`` that it takes classes from."""
    modules: set[str] = set()
    waiting = [name]
    while waiting:
        module = waiting.pop()
        if module in modules or module == "rope_utils" or not (FOLDER / f"{module}.py").exists():
            continue
        modules.add(module)
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                waiting += [node.module] if node.module else [name.name for name in node.names]
    return modules


def row_of(name: str) -> RopeSupport:
    """Return what the source of a module says of it."""
    nodes = [node for module in imported(name) for node in ast.walk(parsed(module))]
    strings = {
        node.value
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    compared = strings & {*TYPES, "su"}
    embeddings = [
        node.name
        for node in nodes
        if isinstance(node, ast.ClassDef) and node.name.endswith(("RoPE", "RotaryEmbedding"))
    ]
    types: frozenset[str] | None = frozenset()
    if any(
        isinstance(n, ast.Call) and getattr(n.func, "id", "") == "initialize_rope" for n in nodes
    ):
        types = SHARED_TYPES
    elif any(isinstance(n, ast.Attribute) and n.attr == "rope_scaling" for n in nodes):
        types = frozenset(compared) or None
    softmax = any(
        "mscale" in (getattr(n, "id", "") or getattr(n, "arg", "") or "")
        for n in nodes
        if isinstance(n, ast.Name | ast.arg | ast.keyword)
    )
    separate = {kind for kind in TYPES for each in embeddings if kind in each.lower()}
    return RopeSupport(types, softmax, frozenset(separate | (compared if embeddings else set())))


def test_every_row_is_that_of_the_installed_mlx_lm() -> None:
    rows = {name: row_of(name) for name in architectures()}
    wrong = {name: row for name, row in rows.items() if row != SUPPORT.get(name, RopeSupport())}
    assert not wrong, "rope_support.SUPPORT needs these rows: " + repr(wrong)
    assert not SUPPORT.keys() - rows.keys()


def test_the_shared_types_are_those_of_initialize_rope() -> None:
    module = ast.parse(Path(rope_utils.__file__).read_text(encoding="utf-8"))
    function = next(
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef) and node.name == "initialize_rope"
    )
    names = {
        constant.value
        for test in ast.walk(function)
        if isinstance(test, ast.Compare) and isinstance(test.left, ast.Name)
        for constant in ast.walk(test)
        if isinstance(constant, ast.Constant) and test.left.id == "rope_type"
    }
    assert names == SHARED_TYPES


@pytest.mark.parametrize("key", ["attention_factor", "truncate"])
def test_embeddings_of_single_modules_do_not_read(key: str) -> None:
    for name, row in SUPPORT.items():
        if row.embedding_types:
            assert key not in ast.unparse(parsed(name)), name


def test_code_that_a_model_brings_reads_its_own_config() -> None:
    assert support_of("custom_model").reads_scaling
    assert support_of("mlx_lm.models.llama").computes("yarn")
    assert not support_of("mlx_lm.models.stablelm").computes("yarn")


def test_the_table_of_heads_that_the_file_decides_is_that_of_mlx_lm() -> None:
    sources = {file.stem: file.read_text() for file in FOLDER.glob("*.py")}
    popped = {name for name, text in sources.items() if 'self.pop("lm_head")' in text}
    assert popped == set(HEAD_BY_FILE)
