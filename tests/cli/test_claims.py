"""One claim of an output: two commands at once, files that appear meanwhile, and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_slim import locks
from mlx_slim.artifacts import atomic_file, atomic_folder, write_text
from mlx_slim.cli.main import run
from mlx_slim.errors import SlimError
from mlx_slim.evaluation import results
from mlx_slim.training.rotation import latest, remove_after, rotate
from tests.support.kills import contents, temporaries

ROOT = Path(__file__).parents[2]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 40)
    return file


@pytest.fixture(params=["train", "distill", "eval", "convert", "quantize", "prune", "export"])
def command(request: Any, small: Path, tiny: Callable[..., Path], text: Path) -> list[str]:
    """A command line without its output."""
    source = tiny("llama")
    other = tiny("llama-mha")
    teacher = f"distill.teachers=[{{model: {other}}}]"
    words: dict[str, list[object]] = {
        "train": ["train", small],
        "distill": ["distill", small, teacher],
        "eval": ["eval", source, "--perplexity", text],
        "convert": ["convert", source],
        "quantize": ["quantize", source, "--group-size", "32", "--calibration", text],
        "prune": ["prune", source, "--ratio", "0.5", "--method", "l2", "--calibration", text],
        "export": ["export", source, "--to", "hf"],
    }
    return [str(word) for word in words[request.param]]


def test_the_second_of_two_commands_into_one_output_is_refused(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The other one runs while this one reports its first event inside of its claim."""
    out = tmp_path / "deep" / "out"
    tried: list[subprocess.CompletedProcess[str]] = []
    write = locks.temporary_file

    def other(path: Path) -> None:
        if not tried and (locks._held or (out / ".mlx-slim.lock").exists()):
            tried.append(
                subprocess.run(
                    [sys.executable, "-m", "mlx_slim", *command, "-o", str(out)],
                    env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
                    capture_output=True,
                    text=True,
                    check=False,
                )
            )

    def temporary_file(path: Path):
        other(path)
        return write(path)

    monkeypatch.setattr(locks, "temporary_file", temporary_file)
    assert run([*command, "-o", str(out)]) == 0
    capfd.readouterr()
    (second,) = tried
    assert second.returncode == 2, second.stderr
    assert f"another process is writing {out}" in second.stderr
    assert second.stderr.count("\n") == 2
    assert not temporaries(contents(tmp_path))


def test_an_output_that_appears_meanwhile_stays(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is there, with something in it, when the finished folder is to get its name."""
    out = tmp_path / "out"
    if command[0] in ("train", "distill", "eval"):  # their folder is there from the beginning
        pytest.skip("the folder is held and filled over time")
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        if Path(target) == out and not out.exists():
            out.mkdir()
            (out / "mine.txt").write_text("keep")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert run([*command, "-o", str(out)]) == 2
    error = capfd.readouterr().err
    assert f"error: {out} exists already: another command created it meanwhile" in error
    assert contents(out) == {"mine.txt": b"keep"}
    assert not temporaries(contents(tmp_path))


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_file_that_appears_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool, kind: str
) -> None:
    out = tmp_path / "recipe.yaml"
    if not links:  # exFAT

        def none(self: Path, target: Path) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(Path, "hardlink_to", none)
    with (
        pytest.raises(SlimError, match="created it meanwhile"),
        atomic_file(out, replace=False) as temporary,
    ):
        temporary.write_text("ours")
        {
            "file": lambda: out.write_text("theirs"),
            "folder": out.mkdir,
            "link": lambda: out.symlink_to("nowhere"),
        }[kind]()
    assert out.is_symlink() or out.is_dir() or out.read_text() == "theirs"
    assert not temporaries(path.name for path in tmp_path.iterdir())
    with pytest.raises(SlimError, match="exists already"):
        write_text(out, "again", replace=False)
    write_text(tmp_path / "new.yaml", "ours", replace=False)
    assert (tmp_path / "new.yaml").read_text() == "ours"
    assert (tmp_path / "new.yaml").stat().st_nlink == 1


def test_what_somebody_put_into_a_folder_that_is_replaced_goes_over(tmp_path: Path) -> None:
    out = tmp_path / "adapters"
    for content in ("old", "new"):
        with atomic_folder(out, replace=True) as folder:
            (folder / "weights").write_text(content)
        (out / "notes").mkdir(exist_ok=True)
        (out / "notes" / "mine.txt").write_text("keep")
        (out / "link").unlink(missing_ok=True)
        (out / "link").symlink_to("nowhere")
    existing = {"link": None, "notes": None, "notes/mine.txt": b"keep", "weights": b"new"}
    assert contents(out) == existing
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]


def test_a_checkpoint_with_a_file_of_somebody_else_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        (folder / "state.json").write_text("{}")
        (folder / "weights.safetensors").write_text("w")
    (tmp_path / "step-1" / "notes.txt").write_text("keep")
    (tmp_path / "step-7").mkdir()  # not a checkpoint
    (tmp_path / "step-7" / "mine.txt").write_text("keep")
    (tmp_path / "step-8").write_text("a file")
    rotate(tmp_path, 1, ())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("step-1", "step-3", "step-7", "step-8")
    ]
    assert (tmp_path / "step-1" / "notes.txt").read_text() == "keep"
    assert latest(tmp_path) == tmp_path / "step-3"
    remove_after(tmp_path, 1)
    assert latest(tmp_path) == tmp_path / "step-1"
    with pytest.raises(SlimError, match="step-1 holds files that belong to no checkpoint"):
        remove_after(tmp_path, 0)
    assert (tmp_path / "step-7" / "mine.txt").exists()


def test_a_resume_of_an_evaluation_touches_only_its_files(
    tiny: Callable[..., Path], text: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["eval", str(tiny("llama")), "--perplexity", str(text), "-o", str(out)]
    assert run(words) == 0
    (out / results.RESULTS_FILE).unlink()
    (out / "samples_mine.jsonl").write_text("keep")
    assert run([*words, "--resume"]) == 0
    assert (out / "samples_mine.jsonl").read_text() == "keep"
    capfd.readouterr()


def test_folders_of_something_else_are_no_demo_and_no_finished_cases(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.md").write_text("mine")
    assert run(["demo", "-o", str(tmp_path)]) == 2
    (tmp_path / "results.json").write_text('{"mine": 1}')
    assert run(["demo", "-o", str(tmp_path)]) == 2
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    assert run(["bench", "plan", "gone", "-o", str(tmp_path / "rows.jsonl")]) == 2
    told = capfd.readouterr().err
    assert told.count("has results of another command") == 2
    assert told.count("has other records than finished cases") == 1
    remaining = {
        "report.md": b"mine",
        "results.json": b'{"mine": 1}',
        "rows.jsonl": b'{"prompt": "a"}\n',
    }
    assert contents(tmp_path) == remaining


STOPPED = """
import os, sys
from mlx_slim import locks
from mlx_slim.cli.main import run
from mlx_slim.console import Console
moment, number = sys.argv[1], int(sys.argv[2])
hear, write = Console.notify, locks.temporary_file
def notify(self, event):
    hear(self, event)
    if event.name not in ("progress", "notice"):  # these come before there is a run
        os.kill(os.getpid(), number)
def temporary_file(path):
    os.kill(os.getpid(), number)
    return write(path)
if moment == "event":
    Console.notify = notify
else:
    locks.temporary_file = temporary_file
sys.exit(run(sys.argv[3:]))
"""


def stop(moment: str, number: int, words: list[str]) -> str:
    """Run a command that gets a signal; return what it told."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, moment, str(number), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    return done.stderr


def test_sigterm_while_a_file_is_written_leaves_nothing(command: Any, tmp_path: Path) -> None:
    work = tmp_path / "work"
    told = stop("file", signal.SIGTERM, [*command, "-o", str(work / "out")])
    left = contents(work) if work.exists() else {}
    assert not temporaries(left), left
    assert not left or "with: mlx-slim" in told  # a run to go on with


def test_sighup_at_an_event_saves_the_state_of_a_run(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "work" / "out"
    told = stop("event", signal.SIGHUP, ["train", str(small), "-o", str(out)])
    assert f"-o {out} --resume" in told
    assert not temporaries(contents(tmp_path / "work"))
