"""Which test file shows what a module does, where it is not ``tests/<folder>/test_<module>.py``.

Invariant: every module of the package with behaviour of its own has a test file of its own name, or
a line in ``tests/mirror.txt`` that names the file whose tests reach it: one that imports it, or a
module that leads to it in two imports, or, for a command, one that runs it. Where the tests reach
a module through a process of its own, the line begins with ``- `` and says so.
``python -m tests.support.mirror`` proposes a line for each module that has neither.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE, TESTS = ROOT / "mlx_slim", ROOT / "tests"
TABLE = TESTS / "mirror.txt"


def modules() -> list[str]:
    """Return the modules with behaviour, as paths in the package: those that define a function."""
    return [
        path.relative_to(PACKAGE).as_posix()
        for path in sorted(PACKAGE.rglob("*.py"))
        if not path.name.startswith("__")
        and any(isinstance(node, ast.FunctionDef) for node in ast.walk(_syntax(path)))
    ]


def path_of_test(module: str) -> str:
    """Return the test file of a module's own name, in ``tests/``."""
    folder, _, name = module.rpartition("/")
    return f"{folder}/test_{name}".lstrip("/")


def table() -> dict[str, str]:
    """Return module -> test file, of ``tests/mirror.txt``."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines if not line.startswith("#"))


@lru_cache(maxsize=1024)
def _syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=1024)
def imported(path: Path) -> frozenset[str]:
    """Return the modules of the package that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(_syntax(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {f"{name.removeprefix('mlx_slim.').replace('.', '/')}.py" for name in names}
    return frozenset(file for file in files if (PACKAGE / file).is_file())


def reaches(test: str, module: str) -> bool:
    """Return whether a test file comes to a module in three imports, or runs it as a command."""
    if test.startswith("- "):
        return True
    file = TESTS / test
    if not file.is_file():
        return False
    near = imported(file)
    for _ in range(2):
        if module in near:
            return True
        near = near.union(*(imported(PACKAGE / one) for one in near))
    if module in near:
        return True
    command = Path(module).stem.rstrip("_")
    words = {node.value for node in ast.walk(_syntax(file)) if isinstance(node, ast.Constant)}
    return module.startswith("cli/") and command in words


def lacking() -> list[str]:
    """Return the modules that have neither a test file of their own name nor a line."""
    lines = table()
    return [
        one for one in modules() if not (TESTS / path_of_test(one)).exists() and one not in lines
    ]


def _proposal(module: str) -> str:
    tests = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py"))
    folder = module.rpartition("/")[0]

    def distance(test: str) -> tuple[bool, bool]:
        return module not in imported(TESTS / test), not test.startswith(folder)

    near = [test for test in tests if reaches(test, module)]
    return min(near, key=distance, default="")


if __name__ == "__main__":
    for each in lacking():
        print(f"{each}\t{_proposal(each)}")
