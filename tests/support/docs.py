"""The code blocks of a page: read, and run as a reader would, on tiny models.

A ```` ```bash ```` or ```` ```python ```` block runs; a block with ``title="NAME"`` is the file
NAME; all others are output or text. A comment in front of a block changes that:
``<!-- needs: KIND -->`` (it cannot run in a test; ``KINDS`` says why) or ``<!-- exit: 2 -->`` (the
last command ends with that code).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mlx_slim.cli.main import run as run_command
from mlx_slim.config import library
from mlx_slim.config.load import load_recipe
from tests.support.tiny import fixed_answer_model, tiny_model

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    "hub": "downloads from the hub something that has no stand-in",
    "mac": "needs a Mac, or a program that runs on one",
    "program": "needs another program (llama.cpp, Ollama, PyTorch, a server)",
    "time": "takes minutes or hours on any machine",
    "checkout": "installs the project or runs its tests",
}
_FENCE = re.compile(
    r"(?:<!-- (?P<mark>needs|exit): (?P<value>\S+) -->\n+)?"
    r'^(?P<indent> *)```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^ *```$',
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: The file that it stands in.
        line: Where it begins, from 1.
        language: As written behind the fence.
        text: Its lines.
        needs: A key of ``KINDS``, or None: it runs.
        exit_code: With which its last command ends.
        title: The file that it is, or None.
    """

    page: str
    line: int
    language: str
    text: str
    needs: str | None = None
    exit_code: int = 0
    title: str | None = None

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and self.needs is None and self.title is None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(path: Path) -> list[Block]:
    """Return the fenced blocks of a page in order.

    Raises:
        AssertionError: If a fence has no language, or a mark is unknown.
    """
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    blocks = []
    for match in _FENCE.finditer(text):
        mark, value = match["mark"], match["value"]
        line = text.count("\n", 0, match.start("language")) + 1
        if mark == "needs":
            assert value in KINDS, f"{name}:{line}: needs {value!r}, expected one of {list(KINDS)}"
        blocks.append(
            Block(
                name,
                line,
                match["language"],
                re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE),
                needs=value if mark == "needs" else None,
                exit_code=int(value) if mark == "exit" else 0,
                title=match["title"],
            )
        )
    fences = len(re.findall(r"^ *```", text, re.MULTILINE))
    assert fences == 2 * len(blocks), f"{name}: {fences} fences, {len(blocks)} blocks: a fence "
    "needs a language (text for output)"
    return blocks


def write_hub(folder: Path) -> Path:
    """Write a cache as huggingface-hub lays it out: every model of the recipes is a tiny one.

    Students are random; teachers answer everything with one word, and end it.
    """
    student = tiny_model(
        folder / "student", "llama-tied", intermediate_size=320, num_hidden_layers=6, head_dim=32
    )
    teacher = fixed_answer_model(folder / "teacher", "Paris")
    for name in library.names("recipes"):
        recipe = load_recipe(name).recipe
        _write_repository(folder, recipe.model, recipe.revision, student)
        for one in recipe.distill.teachers if recipe.distill else []:
            _write_repository(folder, one.model, one.revision, teacher)
    return folder


def _write_repository(hub: Path, name: str | None, revision: str | None, model: Path) -> None:
    home = hub / f"models--{str(name).replace('/', '--')}"
    if name is None or revision is None or (home / "snapshots" / revision).exists():
        return
    for inner in ("refs", "snapshots"):
        (home / inner).mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(revision)
    (home / "snapshots" / revision).symlink_to(model)


_WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def write_mirror(folder: Path, count: int = 40) -> Path:
    """Write a data mirror with a few rows of each data set that the pages name."""
    numbers = range(count)
    some = [" ".join(_WORDS[i % 10 :] + _WORDS[: i % 7]) for i in numbers]
    rows = {
        "alpaca/train": [
            {"instruction": f"Say {i}", "input": "", "output": some[i]} for i in numbers
        ],
        "hellaswag/validation": [
            {
                "ctx_a": some[i],
                "ctx_b": "then",
                "activity_label": "Counting",
                "endings": ["one", "two", "three", "four"],
                "label": str(i % 4),
            }
            for i in numbers
        ],
        "arc_easy/test": [
            {
                "question": some[i],
                "choices": {"text": ["one", "two", "three"], "label": ["A", "B", "C"]},
                "answerKey": "ABC"[i % 3],
            }
            for i in numbers
        ],
    }
    for name, entries in rows.items():
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in entries))
    return folder


def run_block(block: Block, names: dict[str, object]) -> None:
    """Run a block in the working folder; Python blocks of a page share ``names``.

    Raises:
        AssertionError: If a command ends with another code than the block says.
    """
    if block.language == "python":
        exec(compile(block.text, block.place, "exec"), names)
        return
    commands = [line for line in _joined(block.text) if line and not line.startswith("#")]
    for number, line in enumerate(commands, 1):
        expected = block.exit_code if number == len(commands) else 0
        code = _run_line(line)
        assert code == expected, f"{block.place}: exit code {code}, expected {expected}: {line}"


def _joined(text: str) -> list[str]:
    return [line.strip() for line in text.replace("\\\n", " ").splitlines()]


def _run_line(line: str) -> int:
    """Run one command line: those of ours in this process, which saves seconds each."""
    words = shlex.split(line, comments=True)
    if words[0] == "mlx-slim" and not {"|", ">", ">>", "<", "&&", ";"} & set(words):
        return run_command(words[1:])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", line], env={**os.environ, "PATH": path}, check=False)
    return done.returncode
