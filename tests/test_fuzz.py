"""Hostile input of every kind is used or refused in one line: no traceback, no hang, no remains.

The inputs and what reads them stand in ``tests/support/fuzz_models.py`` and beside it; how to
repeat a failure, in ``tests/support/fuzz_run.py``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.errors import SlimError
from tests.support import fuzz_run
from tests.support.fuzz_run import Target, leftovers, mutated, targets

SEED = 0
CASES, COMMANDS = 2000, 8  # a command is a process, of seconds
_ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _shown(failures: list[dict]) -> str:
    return "\n\n".join(
        f"case {one['case']} ({one['target']}), {one['outcome']}: {one['edits']}\n{one['problem']}"
        for one in failures[:10]
    )


def test_mutations_in_process(tmp_path: Path) -> None:
    words = ["-m", "tests.support.fuzz_run", str(tmp_path / "fuzz")]
    words += ["--seed", str(SEED), "--count", str(CASES)]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=_ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert not report["failures"], f"{len(report['failures'])}:\n{_shown(report['failures'])}"
    assert report["cases"] == CASES
    for target in targets():  # neither reads everything nor refuses everything
        assert report["outcomes"][target.name].keys() == {"used", "refused"}, target.name


def _through_the_command_line(case: int, valid: Path, scratch: Path) -> str:
    """Run the command of one mutated input; return what is wrong with how it ended."""
    only = [target for target in targets() if target.command]
    scratch.mkdir()
    target, edits = mutated(SEED + 1, case, valid, scratch, only)
    before = {path.relative_to(scratch).as_posix() for path in scratch.rglob("*")}
    assert target.command
    words = target.command(scratch / "in", scratch / "out")
    done = subprocess.run(
        [sys.executable, "-m", "mlx_slim", *words],
        capture_output=True,
        env=_ENVIRONMENT,
        timeout=120,
        check=False,
    )
    errors = done.stderr.decode(errors="replace")
    problem = ""
    if done.returncode not in (0, 2, 3) or "Traceback" in errors:
        problem = f"exit code {done.returncode}: {errors[-2000:]}"
    elif done.returncode and sum(line.startswith("error: ") for line in errors.splitlines()) != 1:
        problem = f"no line that says what is wrong: {errors[-2000:]}"
    elif done.returncode and (scratch / "out").exists():
        problem = "an output of an input that was refused"
    elif left := leftovers(scratch, before):
        problem = f"left behind: {left}"
    return f"case {case} ({target.name}), {edits}: {problem}" if problem else ""


def test_mutations_through_the_command_line(tmp_path: Path) -> None:
    fuzz_run.make_valid(tmp_path / "valid")
    with ThreadPoolExecutor(2) as pool:
        problems = pool.map(
            lambda case: _through_the_command_line(
                case, tmp_path / "valid", tmp_path / f"case-{case}"
            ),
            range(COMMANDS),
        )
        problems = [problem for problem in problems if problem]
    assert not problems, "\n\n".join(problems)


# ------------------------------ the harness itself


def _refuse(source: Path, out: Path) -> None:
    raise SlimError("no")


def _raise(source: Path, out: Path) -> None:
    raise KeyError("key")


def _hang(source: Path, out: Path) -> None:
    import time

    time.sleep(60)


def _die(source: Path, out: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _leave(source: Path, out: Path) -> None:
    (source / "temporary").touch()


def _half(source: Path, out: Path) -> None:
    out.mkdir()
    raise SlimError("no")


def _write(source: Path, out: Path) -> None:
    out.mkdir()


@pytest.mark.parametrize(
    ("use", "outcome", "problem"),
    [
        (_refuse, "refused", ""),
        (_write, "used", ""),
        (_raise, "raised", "KeyError: 'key'"),
        (_hang, "died", "hung"),
        (_die, "died", "ended with -9"),
        (_leave, "used", "left behind: ['in/temporary']"),
        (_half, "refused", "an output of an input that was refused"),
    ],
)
def test_the_harness_notices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Any, outcome: str, problem: str
) -> None:
    monkeypatch.setattr(fuzz_run, "SECONDS", 0.5)
    (tmp_path / "valid" / "one").mkdir(parents=True)
    (tmp_path / "valid" / "one" / "a.json").write_text('{"a": [1, 2]}')
    target = Target("one", lambda folder: None, ("*.json",), use)
    records = fuzz_run.run(SEED, [0, 1, 2], tmp_path / "valid", tmp_path / "scratch", [target])
    assert [record["case"] for record in records] == [0, 1, 2]
    for record in records:
        assert record["outcome"] == outcome
        assert problem in record["problem"]
        assert bool(problem) == bool(record["problem"])


def test_a_case_is_the_same_every_time(tmp_path: Path) -> None:
    (tmp_path / "valid" / "one").mkdir(parents=True)
    (tmp_path / "valid" / "one" / "a.json").write_text('{"a": [1, 2], "b": {"c": "d"}}')
    target = Target("one", lambda folder: None, ("*.json",), _refuse)
    told = [
        [mutated(3, case, tmp_path / "valid", tmp_path / f"{t}{case}", [target])[1] for t in "ab"]
        for case in range(20)
    ]
    assert all(one == other for one, other in told)
    assert len({one for one, _ in told}) > 15
