"""Print the changes of a version, or say why it cannot be released.

The tag, ``pyproject.toml`` and ``CITATION.cff`` must name the same version, and ``CHANGELOG.md``
must have a section of it with at least one change, and none left under "Unreleased". Standard
library only. To try it: ``python .github/release_notes.py v0.1.0``.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """Return what keeps ``tag`` from being released, one line each."""
    version = tag.removeprefix("v")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    cited = re.search(r'^version: "?([^"\n]+)"?$', citation, re.MULTILINE)
    lines = []
    if not re.fullmatch(r"v\d+\.\d+\.\d+((a|b|rc)\d+)?", tag):
        lines.append(f"the tag {tag} is not v and a version, such as v1.2.3")
    if project["version"] != version:
        lines.append(f"pyproject.toml has version {project['version']}, the tag {version}")
    if cited is None or cited[1] != version:
        lines.append(f"CITATION.cff has version {cited and cited[1]}, the tag {version}")
    if not notes(version, root):
        lines.append(f"CHANGELOG.md has no section '## {version}' with a change in it")
    if notes("Unreleased", root):
        lines.append("CHANGELOG.md has changes under '## Unreleased': move them to the version")
    return lines


def notes(version: str, root: Path = ROOT) -> str:
    """Return the section of ``version`` in CHANGELOG.md; empty if it has no change."""
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        if heading.split()[:1] == [version] and re.search(r"^- \S", body, re.MULTILINE):
            return body.strip()
    return ""


def main() -> int:
    """Print the notes of the tag given, or the problems; return the exit code."""
    tag = sys.argv[1]
    if lines := problems(tag):
        print("\n".join(f"error: {line}" for line in lines), file=sys.stderr)
        return 1
    print(notes(tag.removeprefix("v")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
