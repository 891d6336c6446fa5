"""The site: it builds strictly, loads nothing from elsewhere, and names what exists."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

from tests.support.docs import ROOT

DOCS = ROOT / "docs"
# What a browser fetches by itself: not <a href>, which the reader follows.
LOADS = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=["'](?P<src>[^"']+)"""
    r"""|<link\b(?P<link>[^>]*)>"""
)
REFERENCE = re.compile(r"`(mlx_slim/[\w/]+\.py)(?:::([\w.]+))?`")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    offences = []
    for page in pages:
        for match in LOADS.finditer(page.read_text(encoding="utf-8")):
            attributes = match["link"] or ""
            fetched = match["src"]
            if re.search(r'rel="(?:stylesheet|icon|preload|preconnect)', attributes):
                fetched = re.search(r'href="([^"]+)"', attributes)[1]  # type: ignore[index]
            if fetched and re.match(r"(?:https?:)?//", fetched):
                offences.append(f"{page.relative_to(site)}: {fetched}")
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        offences += [f"{sheet.name}: {u}" for u in re.findall(r"url\((?:https?:)?//[^)]+\)", text)]
    assert not offences, "\n".join(offences)


def test_every_page_is_in_the_navigation(site: Path) -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    absent = [page.name for page in DOCS.glob("*.md") if f" {page.name}\n" not in text]
    assert not absent, f"mkdocs.yml: nav lacks {absent}"


def test_the_reference_pages_hold_what_the_code_has(generate: ModuleType) -> None:
    from mlx_slim.cli.main import COMMANDS
    from mlx_slim.config import library
    from mlx_slim.config.schema import Recipe
    from mlx_slim.config.train import TrainConfig

    commands = generate.commands_page()
    assert all(f"## mlx-slim {name}\n" in commands for name in COMMANDS)
    assert "### mlx-slim bench train\n" in commands and "`--resume`" in commands
    keys = generate.recipe_page()
    for section in (Recipe, TrainConfig):
        assert all(f"| `{key}` |" in keys for key in section.model_fields)
    assert "| `batch_tokens` | integer (≥ 8) | `4096` |" in keys
    assert "`adapter.adaptive`" in keys and "`distill.teachers[]`" in keys
    recipes = generate.recipes_page()
    assert all(f"`{name}`" in recipes for name in library.names("recipes"))


def test_what_has_no_description_fails_the_build(generate: ModuleType) -> None:
    from mlx_slim.config.section import Section

    class Silent(Section):
        """A section.

        Attributes:
            one: Described.
        """

        one: int = 1
        two: int = 2

    class Stale(Section):
        """A section.

        Attributes:
            one: Described.
            gone: Described, and not there.
        """

        one: int = 1

    with pytest.raises(ValueError, match=r"Silent\.two has no description"):
        generate.section_tables(Silent)
    with pytest.raises(ValueError, match=r"\['gone'\], which it has not"):
        generate.section_tables(Stale)

    @click.command(help="Does it.")
    @click.option("--how", default=1, show_default=True)
    def bare(how: int) -> None: ...

    with pytest.raises(ValueError, match=r"bare: \['--how'\] has no help"):
        generate.command_section(bare, click.Context(bare, info_name="bare"))


def test_papers_and_docstrings_name_each_other(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(generate.cited()) == set(generate.PAPERS)
    assert "mlx_slim/adapters/lora.py" in generate.cited()["2106.09685"]
    monkeypatch.setitem(generate.PAPERS, "0001.00001", "A paper that nothing cites")
    with pytest.raises(ValueError, match=r"no docstring cites \['0001.00001'\]"):
        generate.papers_page()
    monkeypatch.delitem(generate.PAPERS, "2106.09685")
    with pytest.raises(ValueError, match=r"PAPERS has no name for \['2106.09685'\]"):
        generate.papers_page()


def _defines(path: Path, dotted: str) -> bool:
    """Whether a file defines ``name`` or ``Class.name`` at its top."""
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name in dotted.split("."):
        node = next((n for n in body if isinstance(n, kinds) and n.name == name), None)
        if node is None:
            return False
        body = node.body
    return True


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_files_and_functions_that_a_page_names_exist(page: Path) -> None:
    if page.name == "lab-log.md":  # of its day
        pytest.skip("the log quotes files as they were")
    offences = []
    for file, dotted in REFERENCE.findall(page.read_text(encoding="utf-8")):
        path = ROOT / file
        if not path.is_file():
            offences.append(f"{page.name}: {file} does not exist")
        elif dotted and not _defines(path, dotted):
            offences.append(f"{page.name}: {file} defines no {dotted}")
    assert not offences, "\n".join(offences)


def test_the_architecture_walks_five_files_each() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    for heading in ("One training step", "One scored question"):
        walk = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
        steps = re.findall(r"^\d\. \*\*`(mlx_slim/[\w/]+\.py)::", walk, re.MULTILINE)
        assert len(steps) == len(set(steps)) == 5, (heading, steps)


def test_links_between_pages_lead_to_files_of_the_repository(site: Path) -> None:
    """Pages that are generated with the site are reached through ``reference.md``."""
    dead = [
        f"{page.name}: {target}"
        for page in [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not dead, f"dead on GitHub: {dead}"
    assert 'href="reference/recipe.html"' in (site / "reference.html").read_text("utf-8")
