"""Every shell and Python block of the guides and the README runs, or is marked and counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.support.docs import KINDS, ROOT, Block, read_blocks, run_block, write_hub, write_mirror

# The log quotes commands of its day; the other pages are promises.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.name not in ("lab-log.md", "messages.md", "glossary.md")]
BLOCKS = {page.relative_to(ROOT).as_posix(): read_blocks(page) for page in PAGES}
RUNNABLE = {name: blocks for name, blocks in BLOCKS.items() if any(b.runs for b in blocks)}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the stand-ins of the hub and of a data mirror."""
    folder = tmp_path_factory.mktemp("docs")
    return {"hub": write_hub(folder / "hub"), "data": write_mirror(folder / "data")}


@pytest.fixture
def offline(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let hub ids name tiny models; what needs the network fails."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(places["hub"]))
    monkeypatch.setenv("HF_HUB_CACHE", str(places["hub"]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MLX_SLIM_DATA", str(places["data"]))
    monkeypatch.setenv("MLX_SLIM_CACHE", str(places["hub"] / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    yield


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_blocks_of_a_page_run_in_order(
    name: str, offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": name}
    ran = 0
    for block in BLOCKS[name]:
        if block.title is not None:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
        elif block.runs:
            run_block(block, names)  # raises AssertionError where an exit code is another
            ran += 1
    assert ran, f"nothing of {name} ran"


def test_marked_blocks_are_counted() -> None:
    """The table in docs/development.md says how many blocks do not run in a test, and why."""
    blocks = [block for page in BLOCKS.values() for block in page]
    counts = Counter(block.needs for block in blocks if block.needs)
    text = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    table = text.split("<!-- blocks -->\n", 1)[1].split("\n\n", 1)[0]
    stated = {kind: int(n) for kind, n in re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", table, re.M)}
    runs = sum(block.runs for block in blocks)
    assert stated == {"runs": runs, **{kind: counts[kind] for kind in KINDS}}
    assert runs > sum(counts.values())


def test_marks_stand_on_shell_and_python_only() -> None:
    marked = [block for page in BLOCKS.values() for block in page if block.needs]
    assert not [block.place for block in marked if block.language not in ("bash", "python")]


def test_a_block_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_block(Block("page.md", 1, "bash", "mlx-slim recipes absent\n", exit_code=2), {})
    with pytest.raises(AssertionError, match=r"page\.md:1: exit code 2, expected 0"):
        run_block(Block("page.md", 1, "bash", "mlx-slim recipes absent\n"), {})
    with pytest.raises(AssertionError, match="exit code 3"):
        run_block(Block("page.md", 1, "bash", "true && exit 3\n"), {})
    with pytest.raises(ZeroDivisionError):
        run_block(Block("page.md", 1, "python", "1 / 0\n"), {})
