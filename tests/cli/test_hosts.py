"""Machines of a host file: two ranks on this one, by MLX's launcher, and files that fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_slim.cli import hosts
from mlx_slim.cli.main import run


def hostfile(folder: Path, count: int) -> Path:
    path = folder / "hosts.json"
    path.write_text(json.dumps([{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}] * count))
    return path


def test_the_machines_of_a_host_file_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", "--hosts", str(hostfile(tmp_path, 2))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "rank 0",
        "rank 1",
        "link",
        "the same everywhere",
    ]
    assert "mlx-slim plan RECIPE --machines 2 --link " in lines[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no host file: Failed to parse hostfile"),
        ("[]", "names 0 hosts, expected 2 or more"),
        ('[{"ssh": "-oProxyCommand=date", "ips": ["::1"]}]', "expected the name of a host"),
        ('[{"ssh": 1, "ips": ["::1"]}]', "ssh is 1, expected the name of a host"),
        ('[{"ssh": "a", "ips": [1]}]', "ips of a is [1], expected a list of addresses"),
        ('[{"ssh": "a", "ips": ["300.1.1.1"]}]', "'300.1.1.1' does not appear to be an IPv4"),
        ('[{"ssh": "a"}]', "ips of a is empty, expected the addresses that the ring listens on"),
    ],
)
def test_a_file_without_hosts_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "hosts.json").write_text(text)
    assert run(["doctor", "--hosts", str(tmp_path / "hosts.json")]) == 2
    assert message in capsys.readouterr().err


def test_machines_that_do_not_answer_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "_LAUNCH", "import sys; sys.exit('no route to host')")
    assert run(["doctor", "--hosts", str(hostfile(tmp_path, 2))]) == 2
    error = capsys.readouterr().err
    assert "gave no answer" in error and "no route to host" in error


def test_what_differs_is_printed_and_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {
        "schema_version": 1,
        "ranks": [
            {"rank": r, "host": "mac", "device": {"type": "gpu", "name": "M4"}, "facts": {}}
            for r in (0, 1)
        ],
        "differences": [{"fact": "mlx", "values": "rank 0: 1; rank 1: 2"}],
        "link": {
            "latency_us": 40.0,
            "megabytes_per_second": 1100.0,
            "gradient_bytes": 84_000_000,
            "gradient_seconds": 0.08,
        },
    }
    monkeypatch.setattr(hosts, "_LAUNCH", f"print({json.dumps(record)!r})")
    assert run(["doctor", "--hosts", str(hostfile(tmp_path, 2)), "--recipe", "smollm2-lora"]) == 1
    printed = capsys.readouterr().out
    assert "differs: mlx: rank 0: 1; rank 1: 2" in printed
    assert "all-reduce of the gradients of a step: 84.0 MB in 0.080 s" in printed


def test_a_recipe_alone_compares_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--recipe", "smollm2-lora"]) == 2
    assert "add --hosts FILE" in capsys.readouterr().err
    assert run(["doctor", "train.steps=2"]) == 2
    assert "name it with --recipe" in capsys.readouterr().err
