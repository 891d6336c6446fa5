"""The entry point: lazy commands, one-line failures, exit codes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from mlx_slim import __version__
from mlx_slim.cli import main as entry
from mlx_slim.errors import ResourceError, SlimError
from tests.support.imports import SLOW, imported_by

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


def slim(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mlx_slim", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes ``mlx-slim doctor`` do what it is given."""

    def install(body: Any):
        @click.command()
        @click.option("--rounds", type=int)
        def fake(rounds: Any):
            body()

        monkeypatch.setattr(entry.LazyGroup, "get_command", lambda self, ctx, name: fake)

    return install


def raising(error: BaseException) -> Callable[[], None]:
    def body():
        raise error

    return body


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    out, heavy = imported_by("from mlx_slim.cli.main import run; run(['--help'])")
    assert "doctor" in out and heavy == "set()\n"


def test_lists_and_help_import_neither_models_nor_data_sets() -> None:
    """They start in under half a second: mlx-lm, which imports transformers, takes two."""
    words = [["recipes"], ["tasks"], *([name, "--help"] for name in entry.available())]
    code = f"from mlx_slim.cli.main import run; print([run(words) for words in {words!r}])"
    out, heavy = imported_by(code)
    assert str([0] * len(words)) in out and not any(f"'{name}'" in heavy for name in SLOW), heavy


def test_what_computes_nothing_imports_no_schemas_and_no_mlx(tmp_path: Path) -> None:
    """Pydantic takes .2 s, NumPy and Jinja .1 s each."""
    words = [["recipes"], ["train", "--help"], ["prune", "--help"], ["recipes", "smollm2-lora"]]
    code = f"from mlx_slim.cli.main import run; print([run(words) for words in {words!r}])"
    out, heavy = imported_by(code + "; import mlx_slim.finetuning.report")
    assert "smollm2-lora" in out and "[0, 0, 0, 0]" in out
    assert heavy.endswith("\n{'jinja2'}\n"), heavy  # of the page


def test_the_list_of_tasks_imports_no_templates() -> None:
    out, heavy = imported_by("from mlx_slim.cli.main import run; run(['tasks'])")
    assert "gsm8k" in out and heavy.endswith("\n{'pydantic'}\n"), heavy


def test_plans_import_neither_models_nor_data_sets(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 1000)
    plans = (["mistral-qlora"], ["smollm2-lora", f"data.path={rows}"], ["phi2-lora", "--json"])
    code = f"from mlx_slim.cli.main import run; print([run(['plan', *words]) for words in {plans}])"
    out, heavy = imported_by(code)
    assert "[0, 0, 0]" in out and not any(f"'{name}'" in heavy for name in SLOW), heavy
    assert "'jinja2'" not in heavy and "'rich'" not in heavy, heavy


def test_the_page_of_a_matrix_is_written_without_what_scores(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "v0_1" / "matrix", folder := tmp_path / "matrix")
    code = f"from mlx_slim.cli.main import run; print(run(['report', {str(folder)!r}]))"
    out, heavy = imported_by(code)
    assert out.endswith("0\n") and not any(f"'{name}'" in heavy for name in SLOW), heavy


@pytest.mark.parametrize("name", list(entry.available()))
def test_every_command_loads_and_explains_itself(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.run([name, "--help"]) == 0
    assert "Usage: mlx-slim" in capsys.readouterr().out


def test_a_module_that_is_absent_is_no_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(entry.COMMANDS, "fly", ("no_such_module", "Fly."))
    assert "fly" not in entry.available()
    assert entry.run(["fly"]) == 2
    assert "no command 'fly'" in capsys.readouterr().err


def test_version_and_bare_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert entry.run([]) == 0
    assert "Make smaller:" in capsys.readouterr().out


def test_a_mistyped_command_and_option_are_met_with_the_closest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert entry.run(["docter"]) == 2
    assert capsys.readouterr().err == ("error: no command 'docter'\nhint: did you mean 'doctor'?\n")
    assert entry.run(["doctor", "--jsno"]) == 2
    assert capsys.readouterr().err == ("error: no option '--jsno'\nhint: did you mean '--json'?\n")
    assert entry.run(["doctor", "extra"]) == 2
    assert "hint: see mlx-slim doctor --help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (SlimError("rank is 0, expected 1 or more", "set adapter.rank=8"), 2, "set adapter.rank"),
        (ResourceError("needs 9 GB, has 8 GB"), 3, "needs 9 GB"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.FileError("x.yaml", "no such file"), 2, "x.yaml"),
    ],
)
def test_failures_are_one_line_and_a_code(
    error: Any, code: int, text: str, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command(raising(error))
    assert entry.run(["doctor"]) == code
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.err.count("error: ") == 1
    assert captured.out == ""


def test_a_message_with_line_breaks_is_still_one_line(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command(raising(SlimError("two\nlines", "a\nhint")))
    entry.run(["doctor"])
    assert capsys.readouterr().err == "error: two lines\nhint: a hint\n"


def traceback_of(line: str) -> str:
    """Return the text of the file that an ``internal error`` names, and remove it."""
    file = Path(line.rpartition("the traceback in ")[2].strip())
    text = file.read_text()
    file.unlink()
    return text


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_an_internal_error_is_one_line_and_a_traceback_in_a_file(
    command: Any,
    capsys: pytest.CaptureFixture[str],
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "opensesame")
    command(raising(ZeroDivisionError("two\nlines with opensesame and hf_abcdefghijkl")))
    assert entry.run(["doctor", "--rounds", "1"]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    shown = "ZeroDivisionError: two lines with (secret) and (secret)"
    assert error == f"error: internal error: {shown}"
    assert hint.startswith(f"hint: please report it, with the traceback in {temporary}/mlx-slim")
    text = traceback_of(hint)
    assert "Traceback (most recent call last)" in text and "in raising" not in text
    assert "test_main.py" in text and "mlx-slim" in text
    assert "opensesame" not in text and "hf_a" not in text


@pytest.mark.parametrize("option", ["-o {}", "--out {}", "--output={}"])
def test_the_traceback_is_beside_the_output(
    command: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, temporary: Path, option: str
) -> None:
    command(raising(ZeroDivisionError("bug")))
    words = option.format(tmp_path / "run").split()
    assert entry._ended(ZeroDivisionError("bug"), ["doctor", *words]) == 1
    hint = capsys.readouterr().err.splitlines()[1]
    assert f"the traceback in {tmp_path}/run.error-" in hint
    assert "ZeroDivisionError: bug" in traceback_of(hint)
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]


def test_without_a_temporary_folder_the_mistake_is_still_one_line(
    command: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    command(raising(RuntimeError("bug")))
    assert entry.run(["doctor"]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: internal error: RuntimeError: bug"
    assert hint.startswith("hint: please report it; MLX_SLIM_DEBUG=1 prints the traceback")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "no space", "a/b"), "the disk is full while writing a/b"),
        (OSError(errno.EDQUOT, "quota", "a/b"), "the quota of the disk is used up while writing"),
        (OSError(errno.EFBIG, "too large", "a/b"), "the file system takes no larger file while"),
        (MemoryError(), "not enough memory: MemoryError"),
        (RuntimeError("[malloc] Unable to allocate 9 bytes."), "not enough memory"),
        (RuntimeError("[METAL] Command buffer failed: Insufficient Memory"), "not enough memory"),
    ],
)
def test_what_the_machine_lacks_is_no_mistake_of_ours(
    error: Any, text: str, command: Any, capsys: pytest.CaptureFixture[str], temporary: Path
) -> None:
    command(raising(error))
    assert entry.run(["doctor"]) == 3
    assert text in capsys.readouterr().err
    assert not [*temporary.iterdir()]


@pytest.mark.parametrize("name", ["TMPDIR", "TMP", "TEMP", "TEMPDIR"])
@pytest.mark.parametrize("kind", ["absent", "a file"])
def test_an_invalid_temporary_folder_is_reported_before_anything_starts(
    name: str,
    kind: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for other in ("TMPDIR", "TMP", "TEMP", "TEMPDIR"):
        monkeypatch.delenv(other, raising=False)
    if kind == "a file":
        (tmp_path / "t").touch()
    monkeypatch.setenv(name, str(tmp_path / "t"))
    assert entry.run(["tasks"]) == 2
    expected = f"error: {name} is '{tmp_path}/t', expected a folder that can be written"
    assert capsys.readouterr().err.splitlines()[0] == expected


def test_a_traceback_that_does_not_fit_on_the_disk_leaves_no_file(tmp_path: Path) -> None:
    work = "from mlx_slim.cli import crash; print(crash._write(ValueError('x' * 9000), []))"
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f 1; {sys.executable} -c "{work}"'],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
    assert not [*tmp_path.iterdir()]


def test_debugging_shows_the_traceback_of_an_internal_error(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_SLIM_DEBUG", "1")
    command(raising(ZeroDivisionError("bug")))
    with pytest.raises(ZeroDivisionError):
        entry.run(["doctor"])


def test_debugging_shows_the_traceback_of_a_users_mistake(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_SLIM_DEBUG", "1")
    command(raising(SlimError("seen")))
    with pytest.raises(SlimError):
        entry.run(["doctor"])


@pytest.mark.parametrize("words", ["--help", "tasks", "data preview {} --rows 24"])
def test_a_reader_that_leaves_is_no_error(words: str, small: Any) -> None:
    words = words.format(small)
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m mlx_slim {words} | (exec <&-)"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0
    assert not any(word in result.stderr for word in ("error", "Traceback", "Broken"))


def test_a_reader_that_leaves_a_run_stops_it_as_ctrl_c_does(small: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = f"{sys.executable} -m mlx_slim train {small} train.steps=5000 -o {out}"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{words} | grep -q '^step 1/'"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    error, hint = result.stderr.splitlines()[-2:]
    assert result.returncode == 130
    assert "stopped" in error and f"-o {out} --resume" in hint


def test_closed_streams_and_a_working_folder_that_is_gone(tmp_path: Path) -> None:
    def shell(text: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-c", text.replace("mlx-slim", f"{sys.executable} -m mlx_slim")],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    limited = shell("ulimit -f 0; mlx-slim recipes smollm2-lora --copy mine.yaml")
    assert limited.returncode == 3
    assert "a file may have at most 0 bytes in this shell while writing mine.yaml" in limited.stderr
    assert "hint: raise it with ulimit -f; nothing was replaced" in limited.stderr
    assert list(tmp_path.iterdir()) == []
    assert shell("mlx-slim tasks <&- >&-").returncode == 0
    assert shell("mlx-slim docter >&- 2>&-").returncode == 2
    full = shell("mlx-slim tasks > /dev/full")
    assert (full.returncode, full.stderr) == (
        3,
        "error: the disk is full\nhint: free some space\n",
    )
    gone = shell("mkdir gone; cd gone; rmdir ../gone; mlx-slim tasks")
    assert (gone.returncode, gone.stdout) == (2, "")
    assert gone.stderr.startswith("error: the working directory was removed\nhint: ")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_characters_that_a_terminal_cannot_show_are_no_error(encoding: str, tmp_path: Path) -> None:
    """A strict stream, as outside of the C locale: an é in ASCII, a file name that is not UTF-8."""
    name = os.fsdecode("né".encode() + b"\xff.yaml")
    for word, code in (("recipes", 2), ("tasks", 2)):
        done = subprocess.run(
            [sys.executable, "-m", "mlx_slim", word, name],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": f"{encoding}:strict"},
            capture_output=True,
            check=False,
        )
        errors = done.stderr.decode()
        assert done.returncode == code
        assert errors.startswith("error: ") and "internal" not in errors, errors
    script = "from mlx_slim.cli import main as m; import sys; m._prepare_streams()"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{script}; print('\\u2212\\udcff'); print(ascii(sys.stdin.read()))",
        ],
        input=b"n\xff",
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": f"{encoding}:strict"},
        capture_output=True,
        check=False,
    )
    minus = "\\u2212" if encoding == "ascii" else "\u2212"
    assert done.stdout.decode(encoding) == f"{minus}\\udcff\n'n\\udcff'\n", done.stderr


def test_the_process_gives_the_exit_code() -> None:
    result = slim("docter")
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert slim("--version").stdout.strip().endswith(__version__)
