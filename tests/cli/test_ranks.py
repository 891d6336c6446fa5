"""Every command says what it does with several ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_slim import runtime
from mlx_slim.cli.main import COMMANDS, run
from mlx_slim.cli.ranks import ONE_RANK, OVER_RANKS, check_ranks
from mlx_slim.errors import SlimError
from tests.support.ranks import ended, started_ranks
from tests.support.runs import write_rows
from tests.support.tiny import TinyModels


class _Ranks:
    """A group of two of which this process is one; nothing is sent."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 2


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setattr(runtime, "world", lambda: _Ranks(0))
    monkeypatch.setattr(runtime, "all_gather_bytes", lambda data, patient: [data, data])
    return monkeypatch


def test_no_command_is_missing_or_in_both_tables() -> None:
    wanting = {name for name in ONE_RANK if " --" not in name}
    assert wanting | set(OVER_RANKS) == set(COMMANDS)
    assert not wanting & set(OVER_RANKS)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - set(OVER_RANKS)))
def test_a_command_of_one_rank_is_one_line(
    name: str, ranks: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[0] == f"error: {name} runs in one process, here are 2 ranks"
    assert len(error) == 2 and error[1].startswith("hint: start it without mlx.launch")


def test_the_other_ranks_say_nothing(
    ranks: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks.setattr(runtime, "world", lambda: _Ranks(1))
    with pytest.raises(SystemExit) as leaving:
        check_ranks("convert")
    assert leaving.value.code == 2
    assert capsys.readouterr().err == ""


def test_comparing_two_results_wants_one_rank(ranks: pytest.MonkeyPatch) -> None:
    with pytest.raises(SlimError, match="eval --compare runs in one process"):
        check_ranks("eval --compare")


@pytest.mark.parametrize("name", OVER_RANKS)
def test_a_command_over_ranks_is_let_through(name: str, ranks: pytest.MonkeyPatch) -> None:
    check_ranks(name)


def test_mlx_is_not_asked_where_nothing_launched_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_RANK", raising=False)
    monkeypatch.setattr(runtime, "world", None)
    check_ranks("convert")


# Rank 0 trains, the other one starts another command, or has another command line.
_RANK = """
import os, sys
from mlx_slim.cli.main import main
sys.argv = ["mlx-slim", *sys.argv[1 + int(os.environ["MLX_RANK"])].split()]
main()
"""


def test_a_rank_with_another_command_ends_all_and_one_says_so(tmp_path: Path) -> None:
    with started_ranks(tmp_path, 2, _RANK, "train x -o y", "convert x -o y") as processes:
        first, second = map(ended, processes)
    assert first == (2, ["error: the ranks disagree on the command"])
    assert second == (2, [])


def test_a_rank_that_cannot_read_its_command_line_ends_the_others(
    tiny: TinyModels, tmp_path: Path
) -> None:
    values = {"model": str(tiny("llama")), "data": {"path": str(write_rows(tmp_path / "rows"))}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    words = f"train {tmp_path / 'recipe.yaml'} -o {tmp_path / 'run'}"
    with started_ranks(tmp_path, 2, _RANK, words, f"{words} train.step=3") as processes:
        first, second = map(ended, processes)
    assert first[0] == 1 and "rank 1 of 2 ended with exit code 2" in first[1][0]
    assert second[0] == 2 and "train.step (command line) is not a key" in second[1][0]
    assert not (tmp_path / "run").exists()


def test_ranks_that_cannot_connect_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    (tmp_path / "hosts.json").write_text("[[], []]")
    runtime.world.cache_clear()
    assert run(["convert"]) == 2
    monkeypatch.undo()
    runtime.world()  # the tests that follow have one rank
    assert (
        "error: the ranks cannot connect: [ring] Rank 0 has no sockets" in capsys.readouterr().err
    )
