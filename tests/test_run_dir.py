"""The command that resumes a run: the words of its options, and the hint after Ctrl-C.

Claims of folders, and kills at every moment, are in ``test_locks.py`` and ``test_kills.py``.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.run_dir import RunDir, RunKind, changed_values, option_words

KIND = RunKind("try", "run", "state.json", ("rows",))


@dataclass(frozen=True)
class Options:
    """One field of each type that an option may have."""

    limit: int | None = None
    chat: bool = True
    sample_all: bool = False
    adapter: tuple[str, ...] | None = None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(), []),
        (Options(limit=3), ["--limit", "3"]),
        (Options(chat=False, sample_all=True), ["--no-chat", "--sample-all"]),
        (Options(adapter=("a b", "c=0.5")), ["--adapter", "a b", "--adapter", "c=0.5"]),
    ],
)
def test_the_words_of_options_are_those_that_differ_from_the_default(
    options: Options, words: list[str]
) -> None:
    assert option_words(options) == words


def test_the_command_can_be_pasted() -> None:
    command = RunDir(Path("my runs/a"), KIND).resume_command(["try", "a b", "x=1"])
    expected = ["mlx-slim", "try", "a b", "x=1", "-o", "my runs/a", "--resume"]
    assert shlex.split(command) == expected


def test_ctrl_c_names_the_command_once_there_is_a_state_file(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run", KIND)
    with pytest.raises(KeyboardInterrupt), run.resumable(lambda: ["try"]):
        raise KeyboardInterrupt
    run.path.mkdir()
    (run.path / KIND.state).touch()
    with (
        pytest.raises(Interrupted, match="what is complete is kept") as caught,
        run.resumable(lambda: ["try"]),
    ):
        raise KeyboardInterrupt
    assert caught.value.hint == f"resume with: mlx-slim try -o {run.path} --resume"
    outer = RunDir(tmp_path, KIND)  # has no state file: a folder in it has
    with (
        pytest.raises(Interrupted, match="answers are kept") as caught,
        outer.resumable(lambda: ["all"], "answers are kept", run),
    ):
        raise KeyboardInterrupt
    assert caught.value.hint == f"resume with: mlx-slim all -o {tmp_path} --resume"


def test_an_interrupt_inside_keeps_its_message_and_gets_the_outer_command(tmp_path: Path) -> None:
    run = RunDir(tmp_path, KIND)
    with (
        pytest.raises(Interrupted, match="after step 3") as caught,
        run.resumable(lambda: ["outer"]),
    ):
        raise Interrupted("stopped after step 3", "resume with: mlx-slim inner")
    assert caught.value.hint == f"resume with: mlx-slim outer -o {tmp_path} --resume"


def test_match_refuses_a_run_that_was_started_otherwise_also_when_nested(tmp_path: Path) -> None:
    def refuse() -> None:
        raise SlimError("started with another recipe")

    run = RunDir(tmp_path / "run", KIND)
    with run.claim(resume=False, match=refuse) as claimed:  # nothing to match yet
        assert not claimed.started
        (run.path / KIND.state).touch()
        with pytest.raises(SlimError, match="another recipe"), run.claim(resume=True, match=refuse):
            pass
    with pytest.raises(SlimError, match="another recipe"), run.claim(resume=True, match=refuse):
        pass
    with run.claim(resume=True) as claimed:
        assert claimed.started and not claimed.nested
        with run.claim(resume=True) as inner:
            assert inner.nested and inner.descriptor == claimed.descriptor


def test_a_folder_whose_name_is_not_utf_8_is_refused_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "run\udcff"
    with (
        pytest.raises(SlimError, match="is not valid UTF-8"),
        RunDir(out, KIND).claim(resume=False),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_value_of_thousands_of_words_is_shortened_in_what_differs() -> None:
    (line,) = changed_values({"a": 1, "b": list(range(9000))}, {"a": 1, "b": None})
    assert line.startswith("b: [0, 1, ") and line.endswith("8999] → None") and len(line) < 600
