"""Every command says what it does with several ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_slim import runtime
from mlx_slim.cli.main import COMMANDS, run
from mlx_slim.cli.ranks import ONE_RANK, OVER_RANKS, check_ranks
from mlx_slim.config.load import load_recipe
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.run import finetune
from mlx_slim.ranks import watch
from tests.support.ranks import ended, started_ranks
from tests.support.runs import Recorder, write_rows
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
    monkeypatch.setattr(watch, "gather_bytes", lambda data, _group, patient: [data, data])
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


def _recipe(tiny: TinyModels, folder: Path) -> Path:
    rows, file = write_rows(folder / "rows.jsonl"), folder / "recipe.yaml"
    train = {"steps": 2, "batch_tokens": 256, "max_length": 128}
    data = {"path": str(rows), "validation": 4}
    values = {"model": str(tiny("llama")), "data": data, "report_answers": 0, "train": train}
    file.write_text(json.dumps(values))
    return file


def test_an_older_run_on_the_disk_of_another_rank_does_not_end_this_one(
    tiny: TinyModels, tmp_path: Path
) -> None:
    """Rank 0 starts anew; rank 1 has a complete run of the same name, and waits for nobody."""
    recipe = _recipe(tiny, tmp_path)
    finetune(load_recipe(str(recipe)), tmp_path / "run-1", observer=Recorder())
    train = f"train {recipe} --quiet -o {tmp_path}/run-"
    words = [f"{train}{rank} --rank-timeout 10s" for rank in range(2)]
    with started_ranks(tmp_path, 2, _RANK, *words) as processes:
        assert [ended(process) for process in processes] == [(0, []), (0, [])]
    assert json.loads((tmp_path / "run-0/run.json").read_text())["status"] == "complete"


def test_a_rank_that_cannot_read_its_command_line_ends_the_others(
    tiny: TinyModels, tmp_path: Path
) -> None:
    words = f"train {_recipe(tiny, tmp_path)} -o {tmp_path / 'run'}"
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
