"""The house plan, held by a test: floors, small files, docstrings, and a tree that is true.

Every failure lists all offenders, so that one run is enough to mend them.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support import mirror

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_slim"
FLOORS = (
    {"errors", "interrupts"},
    {"children", "locks", "ranks", "reading"},
    {"tensor_files", "units"},
    {"events", "next_steps"},
    {"progress", "round_events"},
    {"hashing"},
    {"artifacts"},
    {"claims", "run_dir"},
    {"blas"},
    {"config", "runtime", "power"},
    {"threads"},
    {"agreement"},
    {"pages", "plot_records"},
    {"plots"},
    {"data", "models"},
    {"adapters"},
    {"quantization", "sharding"},
    {"training", "evaluation", "analyze", "export"},
    {"planner", "serving", "cluster"},
    {"finetuning"},
    {"distillation", "preferences"},
    {"rewards"},
    {"pruning"},
    {"slimming", "sweeping"},
    {"api"},
    {"console", "trackers", "compare", "bench"},
    {"cli"},
)
FLOOR = {part: number for number, floor in enumerate(FLOORS) for part in floor}
MOST_LINES = 400
HEAVY = {"mlx", "mlx_lm", "transformers", "datasets", "numpy", "matplotlib", "huggingface_hub"}
# Where the names of open mappings stand; a structure that is known is a frozen record.
OPEN_MAPPINGS = "mlx_slim/reading.py"
MARKER = "<!-- tree -->"
# imported name -> distribution, where they differ
DISTRIBUTION = {
    "annotated_types": "annotated-types",
    "lm_eval": "lm-eval",
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
    "mlx_lm": "mlx-lm",
}
# What a declared dependency cannot be without, in a version that suits it: mlx-lm's, datasets'.
BROUGHT_ALONG = {"transformers", "tokenizers", "pyarrow"}
HOME = re.compile(r"(?<![\w.$}~])/(?:home|Users|root|work|opt|mnt)/\w+")


@cache
def syntax_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: Path) -> str:
    """Return the package or module directly under ``mlx_slim`` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import; ``from a import b`` gives ``a.b``."""
    syntax = syntax_of(path)
    package = (*path.relative_to(ROOT).parent.parts,)
    for node in syntax.body if top_level else ast.walk(syntax):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for name in node.names:
                yield node.lineno, f"{module}.{name.name}"


def listed(offences: list[str]) -> str:
    return "\n" + "\n".join(offences)


def test_imports_go_downward_only() -> None:
    offences = []
    for path in sources():
        part = part_of(path)
        if part in ("__init__", "__main__"):  # the package itself, and the way into the cli
            continue
        if part not in FLOOR:
            offences.append(f"{short(path)}: {part!r} stands on no floor; add it to FLOORS")
            continue
        for line, name in imports(path):
            root, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if root != "mlx_slim" or target not in FLOOR or target == part:
                continue
            if FLOOR[target] >= FLOOR[part]:
                offences.append(f"{short(path)}:{line}: {part} may not import {target}")
    assert not offences, listed(offences)


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _circle(needed: dict[str, set[str]]) -> str:
    """Return a circle among modules and what they import; empty if there is none."""
    try:
        TopologicalSorter(needed).prepare()
    except CycleError as error:
        return " → ".join(error.args[1])
    return ""


def test_no_circles_between_files() -> None:
    """Inside a folder too, and for imports inside functions: each file can be read by itself."""
    files = {_module(path): path for path in sources()}
    needed = {
        module: {
            name if name in files else name.rpartition(".")[0] for _, name in imports(path)
        }.intersection(files)
        - {module}
        for module, path in files.items()
    }
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}), "one is seen"
    assert not (circle := _circle(needed)), f"a circle: {circle}"


def test_only_the_console_and_the_cli_talk_to_the_terminal() -> None:
    offences = []
    for path in sources():
        if path.name == "__main__.py" or FLOOR.get(part_of(path), 0) >= FLOOR["console"]:
            continue
        for line, name in imports(path):
            if name.split(".")[0] in ("rich", "click"):
                offences.append(f"{short(path)}:{line}: {name} below the console")
        offences += [
            f"{short(path)}:{node.lineno}: print; notify an observer instead"
            for node in ast.walk(syntax_of(path))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        ]
    assert not offences, listed(offences)


def test_a_command_imports_what_is_heavy_inside_its_function() -> None:
    offences = [
        f"{short(path)}:{line}: {name} at the top slows every start"
        for path in sources()
        if part_of(path) == "cli"
        for line, name in imports(path, top_level=True)
        if name.split(".")[0] in HEAVY
    ]
    assert not offences, listed(offences)


def test_every_module_says_what_it_is_for() -> None:
    offences = []
    for path in sources():
        text = ast.get_docstring(syntax_of(path)) or ""
        if len(text) < 20 or "TBD" in text:
            offences.append(f"{short(path)}: a docstring that says what it is for")
    offences += [
        f"{short(path)}: a module docstring"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path.stat().st_size and not ast.get_docstring(syntax_of(path))
    ]
    assert not offences, listed(offences)


def test_files_are_small() -> None:
    offences = []
    for path in [*sources(), *sorted((ROOT / "tests").rglob("*.py"))]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines >= MOST_LINES:
            offences.append(f"{short(path)}: {lines} lines, under {MOST_LINES} wanted")
    assert not offences, listed(offences)


def test_nothing_names_a_place_on_one_machine() -> None:
    files = [*sources(), *sorted((ROOT / "tests").rglob("*.py"))]
    files += [*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("evals/**/*.yaml")]
    files += [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/*.py"), ROOT / "mkdocs.yml"]
    files += [ROOT / name for name in ("Makefile", "README.md", "pyproject.toml", "CHANGELOG.md")]
    offences = [
        f"{short(path)}:{number}: {match[0]}"
        for path in files
        if path.exists() and path != Path(__file__)
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (match := HOME.search(text))
    ]
    assert not offences, listed(offences)


def test_what_is_known_is_a_record_and_what_is_open_has_a_name() -> None:
    """``dict[str, Any]`` says nothing of its keys: its few aliases do, each with a reason."""
    anything = {"dict[str, Any]", "Dict[str, Any]"}
    offences = [
        f"{short(path)}:{node.lineno}: a frozen record, or an alias of {OPEN_MAPPINGS}"
        for path in sources()
        if short(path) != OPEN_MAPPINGS
        for node in ast.walk(syntax_of(path))
        if isinstance(node, ast.Subscript) and ast.unparse(node) in anything
    ]
    assert not offences, listed(offences)
    named = (ROOT / OPEN_MAPPINGS).read_text(encoding="utf-8")
    aliases = re.findall(r"(#.*)\n(\w+) = dict\[str, Any\]", named)
    assert len(aliases) == named.count("= dict[str, Any]"), "each alias has its reason above it"


def _requirements(lines: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_-]", line)[0].lower() for line in lines}


def test_what_is_imported_is_declared_and_extras_stay_optional() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = _requirements(project["dependencies"])
    optional = set().union(*map(_requirements, project["optional-dependencies"].values()))
    offences = []
    for path in sources():
        always = {line for line, _ in imports(path, top_level=True)}
        for line, name in imports(path):
            root = name.split(".")[0]
            if root in sys.stdlib_module_names or root in {"mlx_slim", *BROUGHT_ALONG}:
                continue
            distribution = DISTRIBUTION.get(root, root).lower()
            if distribution in needed:
                continue
            if distribution not in optional:
                offences.append(f"{short(path)}:{line}: {root} is not in pyproject.toml")
            elif line in always:
                offences.append(f"{short(path)}:{line}: {root} is an extra: import it when used")
    assert not offences, listed(offences)


def documented_layout(text: str) -> list[tuple[int, str, str]]:
    """Return (column, name, what it says) of each line of the block after ``MARKER``."""
    block = re.search(re.escape(MARKER) + r"\s*```\w*\n(.*?)```", text, re.DOTALL)
    assert block, (
        f"docs/architecture.md needs the line {MARKER} followed by a fenced block: a line "
        "`mlx_slim/`, then one indented line for each package (`train/`) and module (`errors.py`) "
        "directly in it, each with two spaces and what it is for; other top-level entries stand "
        "unindented"
    )
    entries = []
    for line in block[1].splitlines():
        plain = re.sub(r"[│├└─]", " ", line)
        if match := re.match(r"(\s*)(\S+)(?:\s+(.*))?$", plain):
            entries.append((len(match[1]), match[2], (match[3] or "").strip()))
    return entries


def test_the_documented_tree_is_the_tree_on_disk() -> None:
    page = ROOT / "docs" / "architecture.md"
    entries = documented_layout(page.read_text(encoding="utf-8"))
    start = next((i for i, (_, name, _) in enumerate(entries) if name == "mlx_slim/"), None)
    assert start is not None, "the tree has no line `mlx_slim/`"
    base = entries[start][0]
    inside = []
    for entry in entries[start + 1 :]:
        if entry[0] <= base:
            break
        inside.append(entry)
    first = min((column for column, _, _ in inside), default=0)
    children = {name: says for column, name, says in inside if column == first}
    on_disk = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    on_disk |= {path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
    offences = [
        f"mlx_slim/{name} is not in the tree of docs/architecture.md"
        for name in on_disk - set(children)
    ]
    offences += [f"docs/architecture.md names mlx_slim/{name}" for name in set(children) - on_disk]
    offences += [
        f"mlx_slim/{name}: the tree does not say what" for name, s in children.items() if not s
    ]
    for column, name, _ in entries:
        if column == base and not (ROOT / name).exists():
            offences.append(f"docs/architecture.md names {name}, which is not on disk")
    assert not offences, listed(sorted(offences))


@pytest.mark.parametrize("folder", ["recipes", "evals"])
def test_what_ships_in_the_wheel_exists(folder: str) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    included = tomllib.loads(text)["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert (ROOT / folder).is_dir() == (folder in included), (
        f"{folder}/ and pyproject.toml disagree"
    )


def test_tests_mirror_the_package() -> None:
    """A module has a test file of its name, or ``tests/mirror.txt`` says which file reaches it."""
    assert not mirror.lacking(), f"no test file: {mirror.lacking()}; {mirror.__doc__}"
    lines = mirror.table()
    named = [one for one in lines if (mirror.TESTS / mirror.path_of_test(one)).exists()]
    assert not named, f"mirror.txt: these have a test file of their own name: {named}"
    gone = [one for one in lines if one not in mirror.modules()]
    assert not gone, f"mirror.txt: these define no function: {gone}"
    apart = [
        f"{test} does not reach {one}"
        for one, test in lines.items()
        if not mirror.reaches(test, one)
    ]
    assert not apart, apart
