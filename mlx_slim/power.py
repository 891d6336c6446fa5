"""The laptop around a run: sleep is prevented, and battery and memory pressure are read.

Invariant: what keeps the machine awake watches this process and ends with it, also after SIGKILL;
nothing here raises where a program or a file is absent: such a machine is not watched. Try it:
``mlx-slim train smollm2-lora -o runs/try`` and, on a Mac, ``pmset -g assertions``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

POWER_SUPPLIES = Path("/sys/class/power_supply")
PRESSURE = Path("/proc/pressure/memory")
STALLED_PERCENT = 10.0  # of a minute that programs waited for memory
_LEVELS = {2: "warning", 4: "critical"}  # of macOS's kern.memorystatus_vm_pressure_level
_SECONDS = 5.0  # for a program that answers at once


def inhibitor(pid: int) -> list[str] | None:
    """Return the command that prevents sleep until process ``pid`` has ended; None without one.

    A closed lid and an empty battery still put a laptop to sleep.
    """
    if sys.platform == "darwin" and shutil.which("caffeinate"):
        return ["caffeinate", "-i", "-w", str(pid)]
    if shutil.which("systemd-inhibit") and shutil.which("tail"):
        command = ["systemd-inhibit", "--what=idle:sleep", "--who=mlx-slim", "--why=training"]
        return [*command, "--mode=block", "tail", f"--pid={pid}", "-f", "/dev/null"]
    return None


@contextlib.contextmanager
def keep_awake(enabled: bool = True) -> Iterator[None]:
    """Inside, the machine does not fall asleep by itself; ``enabled=False`` changes nothing."""
    command = inhibitor(os.getpid()) if enabled else None
    if command is None:
        yield
        return
    silent = subprocess.DEVNULL
    # A session of its own: Ctrl-C is for the run, which saves its state before it ends.
    try:
        child = subprocess.Popen(
            command, stdin=silent, stdout=silent, stderr=silent, start_new_session=True
        )
    except OSError:  # a program that cannot be run
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # it ended before
            os.killpg(child.pid, signal.SIGTERM)  # systemd-inhibit, and what it waits for
        child.wait()


def _output(*command: str) -> str:
    """Return what a program prints, empty if it is absent or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
        return done.stdout
    return ""


def _contents(file: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return file.read_text().strip()
    return ""


def battery_percent() -> int | None:
    """Return the charge of the battery that the machine runs on; None on mains, or unknown."""
    if sys.platform == "darwin":
        return _mac_battery(_output("pmset", "-g", "batt"))
    return _linux_battery(sorted(POWER_SUPPLIES.glob("*")) if POWER_SUPPLIES.is_dir() else [])


def _mac_battery(text: str) -> int | None:
    if "'Battery Power'" not in text:
        return None
    charge = re.search(r"(\d+)%", text)
    return int(charge[1]) if charge else None


def _linux_battery(supplies: Sequence[Path]) -> int | None:
    for supply in supplies:
        # The battery of a mouse has the scope Device.
        if _contents(supply / "type") != "Battery" or _contents(supply / "scope") == "Device":
            continue
        capacity = _contents(supply / "capacity")
        if _contents(supply / "status") == "Discharging" and capacity.isdigit():
            return int(capacity)
    return None


def memory_pressure() -> str | None:
    """Return how short of memory the system is, in words with the figure; None if it is not."""
    if sys.platform == "darwin":
        level = _output("sysctl", "-n", "kern.memorystatus_vm_pressure_level").strip()
        number = int(level) if level.isdigit() else 0
        return f"pressure level {number}, {_LEVELS[number]}" if number in _LEVELS else None
    waited = re.search(r"^some .*\bavg60=([\d.]+)", _contents(PRESSURE), re.MULTILINE)
    if waited is None or float(waited[1]) < STALLED_PERCENT:
        return None
    return f"programs waited for it {float(waited[1]):.0f}% of the last minute"
