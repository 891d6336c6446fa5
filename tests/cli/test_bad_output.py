"""An output that cannot be written: one clear line, said early, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.cli.main import run


def test_output_that_exists(
    fails: Callable[..., str], small: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    assert "not empty" in fails("train", small, "-o", out)
    assert "exists" in fails("quantize", tiny("llama"), "-o", out)
    assert "exists" in fails("convert", tiny("llama"), "-o", out)
    assert (out / "mine.txt").read_text() == "keep me"


def test_an_output_of_the_same_command_is_complete(
    fails: Callable[..., str],
    tiny: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    words = ["quantize", str(tiny("llama")), "-o", str(out), "--group-size", "32"]
    words += ["--fidelity-samples", "0"]
    assert run(words) == 0
    capfd.readouterr()
    assert run(words) == 0
    assert capfd.readouterr().out == f"{out} is complete: nothing to do\n"
    assert run([*words, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["status"] == "complete"
    assert "exists already" in fails(*words, "--bits", "3")
    assert "exists already" in fails("convert", tiny("llama"), "-o", out)


def test_output_under_a_file(
    fails: Callable[..., str], small: Path, rows: Path, tiny: Callable[..., Path]
) -> None:
    for words in (
        ["train", small, "-o", rows / "run"],
        ["quantize", tiny("llama"), "-o", rows / "out"],
        ["convert", tiny("llama"), "-o", rows / "out"],
    ):
        text = fails(*words)
        assert "rows.jsonl" in text


def test_output_that_is_a_file(
    fails: Callable[..., str], small: Path, rows: Path, tiny: Callable[..., Path]
) -> None:
    for words in (
        ["train", small, "-o", rows],
        ["quantize", tiny("llama"), "-o", rows],
        ["convert", tiny("llama"), "-o", rows],
    ):
        assert "rows.jsonl" in fails(*words)


def test_output_in_new_folders(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A missing parent is made, not refused."""
    assert run(["train", str(small), "--quiet", "-o", str(tmp_path / "a" / "b" / "run")]) == 0
    assert (tmp_path / "a" / "b" / "run" / "run.json").is_file()
    capfd.readouterr()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
@pytest.mark.parametrize("place", ["/proc/x", "/proc/a/x", "/proc/self/fd/x"])
def test_a_place_where_nothing_can_be_created(
    fails: Callable[..., str], small: Path, tiny: Callable[..., Path], place: str
) -> None:
    """The system says that the new file does not exist, rather than that it may not be made."""
    for words in (
        ["recipes", "smollm2-lora", "--copy", f"{place}.yaml"],
        ["train", small, "-o", place],
        ["convert", tiny("llama"), "-o", place],
    ):
        assert f"cannot write {place}" in fails(*words)


@contextlib.contextmanager
def _mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(params=["train", "quantize", "convert", "eval"])
def writing(
    request: pytest.FixtureRequest, small: Path, tiny: Callable[..., Path], tmp_path: Path
) -> list[object]:
    """A command line that would write; its last word, the output, is missing."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 200)
    words: dict[str, list[object]] = {
        "train": ["train", small],
        "quantize": ["quantize", tiny("llama"), "--calibration", text],
        "convert": ["convert", tiny("llama")],
        "eval": ["eval", tiny("llama"), "--perplexity", text],
    }
    return [*words[request.param], "-o"]


def test_a_read_only_file_system(fails: Callable[..., str], writing: Any, tmp_path: Path) -> None:
    with _mounted(tmp_path / "disk", "ro") as disk:
        assert "cannot write" in fails(*writing, disk / "a" / "out")


@pytest.mark.parametrize("size", ["4k", "64k"])
def test_a_full_disk(fails: Callable[..., str], writing: Any, tmp_path: Path, size: str) -> None:
    with _mounted(tmp_path / "disk", f"size={size}") as disk:
        text = fails(*writing, disk / "a" / "out", code=3)
        assert "disk" in text
        assert list(disk.iterdir()) == []
