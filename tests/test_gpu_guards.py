"""What only a CPU can do names the CPU, and what only pays there asks first: read off the source.

MLX raises at the first call on a GPU, which no machine without one meets.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
import pytest

from tests.test_architecture import PACKAGE, syntax_of

# Functions of mx.linalg that run on a GPU. ``norm`` takes singular values for some orders.
LINALG_ON_GPU = {"norm", "cross"}
# Calls that are for a CPU only: threads that share BLAS, kernels that lack a GPU's counterpart.
TRICKS = {"single_threaded", "run_in_threads", "disable_compile", "_codes"}
# Calls that convert a whole model if they are given float32, which only a CPU computes fastest.
WIDENING = {"cast", "load", "load_base", "open_weights"}
# Functions that give layers a forward pass which is the faster one on a CPU only.
FAST_ON_A_CPU = {"use_fast_matmul", "use_fast_swiglu", "quantize_into_fast"}
QUESTIONS = {"on_gpu", "default_num_threads", "compute_dtype", "part_count"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE.parent)), syntax_of(path)


def dotted(node: ast.expr) -> str:
    """Return ``mx.linalg.qr`` for that expression; empty for others."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ""


def last_name(call: ast.Call) -> str:
    return dotted(call.func).rpartition(".")[2]


def wrong_linalg(module: ast.Module) -> list[int]:
    """Return the lines that call what MLX has for a CPU only without ``stream=mx.cpu``."""
    wrong = []
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx.core"):
            wrong.append(node.lineno)  # under another name it would not be offenders
        if isinstance(node, ast.Import):
            wrong += [
                node.lineno
                for alias in node.names
                if alias.name.startswith("mlx.core") and alias.asname != "mx"
            ]
        if not isinstance(node, ast.Call) or not dotted(node.func).startswith("mx.linalg."):
            continue
        words = {word.arg: dotted(word.value) for word in node.keywords}
        plain = last_name(node) in LINALG_ON_GPU and "ord" not in words and len(node.args) == 1
        if not plain and words.get("stream") != "mx.cpu":
            wrong.append(node.lineno)
    return wrong


def wide_numbers(module: ast.Module) -> list[int]:
    """Return the lines that name ``mx.float64``, which no GPU has."""
    return [
        node.lineno
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and dotted(node) == "mx.float64"
    ]


def unguarded(module: ast.Module) -> list[int]:
    """Return the lines of tricks in functions that did not ask for the device before."""
    wrong: list[int] = []
    outermost = [
        each
        for node in ast.walk(module)
        for each in ast.iter_child_nodes(node)
        if isinstance(each, ast.FunctionDef) and not isinstance(node, ast.FunctionDef)
    ]
    for function in outermost:
        calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
        first_question = min(
            (call.lineno for call in calls if last_name(call) in QUESTIONS), default=10**9
        )
        wrong += [call.lineno for call in calls if _is_trick(call) and call.lineno < first_question]
        if (
            function.name in FAST_ON_A_CPU and first_question == 10**9
        ):  # gives layers another forward
            wrong.append(function.lineno)
    return wrong


def _is_trick(call: ast.Call) -> bool:
    values = [*call.args, *(word.value for word in call.keywords)]
    wide = any("mx.float32" in {dotted(each), *_alternatives(each)} for each in values)
    return last_name(call) in TRICKS or (last_name(call) in WIDENING and wide)


def _alternatives(node: ast.expr) -> set[str]:
    return {dotted(node.body), dotted(node.orelse)} if isinstance(node, ast.IfExp) else set()


Check = Callable[[ast.Module], list[int]]


@pytest.mark.parametrize("check", [wrong_linalg, wide_numbers, unguarded])
def test_the_package_asks_a_gpu_for_nothing_it_lacks(check: Check) -> None:
    offenders = [
        f"{name}:{line}"
        for name, module in sources()
        # What is measured there is compared in float32 on every device.
        if not (check is unguarded and name.startswith("mlx_slim/bench/"))
        for line in check(module)
    ]
    assert offenders == []


@pytest.mark.parametrize(
    ("check", "code", "lines"),
    [
        (wrong_linalg, "mx.linalg.qr(a)\nmx.linalg.qr(a, stream=mx.cpu)", [1]),
        (wrong_linalg, "mx.linalg.norm(a)\nmx.linalg.norm(a, ord='nuc')", [2]),
        (wrong_linalg, "mx.linalg.norm(a, 2)\nmx.linalg.norm(a, axis=1)", [1]),
        (wrong_linalg, "mx.linalg.svd(a, stream=stream)", [1]),
        (wrong_linalg, "from mlx.core import linalg\nimport mlx.core as mx", [1]),
        (wrong_linalg, "np.linalg.svd(a)", []),
        (wide_numbers, "a.astype(mx.float64)\na.astype(np.float64)", [1]),
        (unguarded, "def f():\n  with blas.single_threaded(): g()\n  on_gpu()", [2]),
        (unguarded, "def f():\n  if on_gpu(): return\n  with blas.single_threaded(): g()", []),
        (unguarded, "class A:\n  def f(self):\n    cast(model, mx.float32)", [3]),
        (unguarded, "def use_fast_matmul():\n  layer.__class__ = Fast", [1]),
        (unguarded, "def f(x):\n  load(a, dtype=mx.float32 if x else None)", [2]),
    ],
)
def test_what_it_lacks_is_found(check: Check, code: str, lines: list[int]) -> None:
    assert check(ast.parse(code)) == lines


def test_float64_of_numpy_arrives_as_float32() -> None:
    assert mx.array(np.zeros(3)).dtype == mx.array(np.float64(1)).dtype == mx.float32


def test_the_list_of_what_runs_on_a_gpu_names_functions_of_mlx() -> None:
    assert set(dir(mx.linalg)) >= LINALG_ON_GPU


@pytest.mark.parametrize("name", sorted(TRICKS | WIDENING | QUESTIONS | FAST_ON_A_CPU))
def test_no_name_of_the_lists_is_stale(name: str) -> None:
    assert any(name in path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
