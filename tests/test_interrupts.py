"""Ctrl-C, SIGTERM and SIGHUP: one wish, told once, that leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_slim import interrupts
from mlx_slim.cli import main as entry

ROOT = Path(__file__).parents[1]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_each_signal_is_an_interrupt_and_the_handlers_come_back(number: Any) -> None:
    before = [signal.getsignal(each) for each in interrupts.SIGNALS]
    with pytest.raises(KeyboardInterrupt) as caught, interrupts.raise_on_signal():
        send(number)
    assert isinstance(caught.value, interrupts.Terminated) == (number != signal.SIGINT)
    assert [signal.getsignal(each) for each in interrupts.SIGNALS] == before


def test_what_follows_at_once_does_not_cut_the_clean_up_short() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.raise_on_signal():
        try:
            send(signal.SIGINT)
        finally:
            send(signal.SIGTERM)
            done.append("first")
            with pytest.raises(interrupts.Terminated):  # later, it is another wish
                time.sleep(interrupts.SAME)
                send(signal.SIGTERM)
    assert done == ["first"]


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with (
            interrupts.raise_on_signal(),
            interrupts.SignalFlag() as stop,
            interrupts.deferred_signals(),
        ):
            send(signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, former)


def test_an_undivided_block_is_done_before_the_interrupt() -> None:
    done = []
    with interrupts.raise_on_signal():
        with pytest.raises(interrupts.Terminated), interrupts.deferred_signals():
            with interrupts.deferred_signals():
                send(signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        assert done == ["inner", "outer"]
        with interrupts.SignalFlag() as stop, interrupts.deferred_signals():
            send(signal.SIGINT)
        assert stop.requested  # sent again to who listened before


def test_an_interrupt_in_a_destructor_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    class Slow:
        def __del__(self) -> None:
            send(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), interrupts.raise_on_signal():
        Slow()
        time.sleep(5)
    assert "Traceback" not in capfd.readouterr().err


def start(*words: object, cwd: Path, path: Path = ROOT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_slim", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{path}:{ROOT}", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


INTERRUPTING = """
import os, signal, sys
seen = []
def hear(event, arguments):
    if event == "import" and (seen or arguments[0] == "mlx_slim.cli"):
        seen.append(arguments[0])
        if len(seen) == {moment}:
            os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hear)
"""


@pytest.mark.parametrize("moment", [1, 60, 115, 300, 560])
def test_ctrl_c_while_a_command_is_loaded_gives_no_traceback(
    moment: int, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING.format(moment=moment))
    (tmp_path / "work").mkdir()
    process = start("convert", tiny("llama"), "-o", "out", cwd=tmp_path / "work", path=tmp_path)
    told = process.communicate(timeout=60)[1]
    assert "Traceback" not in told
    assert process.returncode in (130, -signal.SIGINT), told
    assert not [*(tmp_path / "work").iterdir()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_conversation_ends_on_a_signal_that_is_no_ctrl_c(
    number: Any, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    process = start("chat", tiny("llama"), "--max-tokens", "400", cwd=tmp_path)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("hello\n")
    process.stdin.flush()
    assert process.stdout.read(1)  # it answers
    process.send_signal(number)
    assert process.wait(timeout=60) == 130
    process.communicate()


def test_the_end_of_a_command_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal while the exit code is on its way: the system's own end, without a traceback."""
    monkeypatch.setattr(entry, "run", lambda: 7)
    former = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    try:
        with pytest.raises(SystemExit) as caught:
            entry.main()
        assert {signal.getsignal(number) for number in interrupts.SIGNALS} == {signal.SIG_DFL}
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    assert caught.value.code == 7
