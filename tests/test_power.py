"""Sleep is prevented by a child that ends with us; batteries and pressure are read where they are.

Programs that only a Mac or a desktop has are scripts of the test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_slim import power

ON_BATTERY = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=21561443)\t83%; discharging; 3:10 remaining present: true
"""
ON_MAINS = """Now drawing from 'AC Power'
 -InternalBattery-0 (id=21561443)\t83%; charging; 1:02 remaining present: true
"""


def _program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of programs that is searched first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def _exists(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    done = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()[:1] not in ("", "Z")


def _eventually(condition: object) -> bool:
    for _ in range(200):
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


def test_each_system_is_kept_awake_by_its_own_program_for_this_process(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    _program(programs, "caffeinate", "")
    assert power.inhibitor(7) == ["caffeinate", "-i", "-w", "7"]
    monkeypatch.setattr(sys, "platform", "linux")
    _program(programs, "systemd-inhibit", "")
    command = power.inhibitor(7)
    assert command is not None
    assert command[:2] == ["systemd-inhibit", "--what=idle:sleep"]
    assert command[-4:] == ["tail", "--pid=7", "-f", "/dev/null"]
    monkeypatch.setattr(power.shutil, "which", lambda name: None)
    assert power.inhibitor(7) is None


def test_the_child_lives_as_long_as_the_block(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "pid"
    _program(programs, "awake", f"echo $$ > {note}; exec sleep 600")
    monkeypatch.setattr(power, "inhibitor", lambda pid: ["awake"])
    with power.keep_awake():
        assert _eventually(lambda: note.exists() and note.read_text().strip())
        child = int(note.read_text())
        assert _exists(child)
        assert os.getsid(child) != os.getsid(0)  # Ctrl-C does not reach it
    assert not _exists(child)
    monkeypatch.setattr(power, "inhibitor", lambda pid: pytest.fail("asked"))
    with power.keep_awake(False):
        pass


def test_a_program_that_cannot_be_run_stops_no_training(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (programs / "awake").write_bytes(b"\x7fELF nothing")
    (programs / "awake").chmod(0o755)
    monkeypatch.setattr(power, "inhibitor", lambda pid: ["awake"])
    trained = []
    with power.keep_awake():
        trained.append("it is no program")
    _program(programs, "awake", "exit 1")  # it may have ended before the block does
    with power.keep_awake():
        time.sleep(0.2)
        trained.append("it ended")
    assert trained == ["it is no program", "it ended"]


def test_what_the_child_started_ends_with_the_block(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As systemd-inhibit does: it is not the one that waits."""
    note = tmp_path / "pid"
    _program(programs, "awake", f"sleep 600 &\necho $! > {note}\nwait")
    monkeypatch.setattr(power, "inhibitor", lambda pid: ["awake"])
    with power.keep_awake():
        assert _eventually(lambda: note.exists() and note.read_text().strip())
        child = int(note.read_text())
        assert _exists(child)
    assert _eventually(lambda: not _exists(child))


def test_the_child_ends_after_sigkill_too(programs: Path, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    # As systemd-inhibit does: holds the inhibition while its command runs.
    _program(
        programs, "systemd-inhibit", f'while [ "${{1#--}}" != "$1" ]; do shift; done; "$@" &\n'
        f"echo $! > {note}; wait"
    )  # fmt: skip
    script = (
        "import os, signal, sys, time; sys.platform = 'linux'\n"
        "from pathlib import Path\n"
        "from mlx_slim.power import keep_awake\n"
        "with keep_awake():\n"
        f"    note = Path({str(note)!r})\n"
        "    while not (note.exists() and note.read_text().strip()):\n"
        "        time.sleep(0.02)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    if subprocess.run(["tail", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("tail of GNU coreutils, as every system with systemd has it")
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    child = int(note.read_text())
    assert _eventually(lambda: not _exists(child))


def test_a_battery_is_read_on_a_mac(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    _program(programs, "pmset", f'test "$1$2" = -gbatt || exit 1\ncat <<"END"\n{ON_BATTERY}END')
    assert power.battery_percent() == 83
    _program(programs, "pmset", f'cat <<"END"\n{ON_MAINS}END')
    assert power.battery_percent() is None
    _program(programs, "pmset", "exit 1")
    assert power.battery_percent() is None


def test_a_battery_is_read_on_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(power, "POWER_SUPPLIES", tmp_path / "absent")
    assert power.battery_percent() is None
    monkeypatch.setattr(power, "POWER_SUPPLIES", tmp_path)

    def supply(name: str, **files: str) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        for key, value in files.items():
            (tmp_path / name / key).write_text(value + "\n")

    supply("AC", type="Mains", online="0")
    supply("hid-mouse", type="Battery", scope="Device", status="Discharging", capacity="12")
    assert power.battery_percent() is None
    supply("BAT0", type="Battery", status="Discharging", capacity="64")
    assert power.battery_percent() == 64
    supply("BAT0", status="Charging")
    assert power.battery_percent() is None


def test_memory_pressure_is_read(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    for level, text in (
        (1, None),
        (2, "pressure level 2, warning"),
        (4, "pressure level 4, critical"),
    ):
        _program(programs, "sysctl", f"echo {level}")
        assert power.memory_pressure() == text
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(power, "PRESSURE", tmp_path / "memory")
    assert power.memory_pressure() is None  # a kernel without it
    line = "some avg10=0.00 avg60={} avg300=0.00 total=0\nfull avg10=0.00 avg60=99.00 total=0\n"
    power.PRESSURE.write_text(line.format("3.20"))
    assert power.memory_pressure() is None
    power.PRESSURE.write_text(line.format("41.70"))
    assert power.memory_pressure() == "programs waited for it 42% of the last minute"
