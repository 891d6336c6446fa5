"""Every command says what it does with several ranks."""

from __future__ import annotations

import pytest

from mlx_slim import runtime
from mlx_slim.cli.main import COMMANDS, run
from mlx_slim.cli.ranks import ONE_RANK, OVER_RANKS, check_ranks
from mlx_slim.errors import SlimError


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
