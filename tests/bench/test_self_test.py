"""The self-test: every check passes on a right machine, and sees the piece that is broken."""

from __future__ import annotations

import getpass
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.bench import self_checks, self_test, small_model
from mlx_slim.bench.self_checks import CHECKS, Deviation, Place
from mlx_slim.cli.main import run
from mlx_slim.evaluation.scoring import loglikelihood
from mlx_slim.models import quantized, structure
from mlx_slim.training import losses
from mlx_slim.training.optim import Optimizer

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
}
SPEED = {"matmul_float32_gflops": 1.0, "matmul_bfloat16_gflops": 1.0, "exp_ns": 1.0}
PEAKS = {
    "predicted_peak_bytes": 110,
    "measured_peak_bytes": 100,
    "computed_tokens": 10,
    "seconds_per_batch": 2.0,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the model of the self-test tiny, and its measurements quick."""
    for key, value in TINY.items():
        monkeypatch.setitem(small_model.CONFIG, key, value)
    monkeypatch.setattr(self_test, "ROWS", 5)
    monkeypatch.setattr("mlx_slim.bench.machine.speed", lambda: SPEED)
    monkeypatch.setattr(self_checks, "run_side", lambda *_: PEAKS)


@pytest.fixture
def place(small: None, tmp_path: Path) -> Place:
    work = tmp_path / "work"
    work.mkdir()
    model = small_model.write_small_model(tmp_path / "model")
    return Place(model, small_model.write_rows(tmp_path / "rows.jsonl", 5), work)


def _status(place: Place, title: str) -> dict[str, str]:
    lines: list[str] = []
    results = self_test._run(title, CHECKS[title], place, lines.append)
    return {result.check: result.status for result in results}


def _wrong_softmax(patch: pytest.MonkeyPatch) -> None:
    right = losses.row_sums
    patch.setattr(losses, "row_sums", lambda values: 1.01 * right(values))


def _leaking_segments(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(structure, "supports_packing", lambda model: True)
    patch.setattr(structure.SegmentCache, "make_mask", lambda *_, **__: "causal")


def _rounding_compiler(patch: pytest.MonkeyPatch) -> None:
    def compiled(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result, gradients = function(*arguments)
            return result, {path: 1.01 * value for path, value in gradients.items()}

        return call

    patch.setattr(mx, "compile", compiled)


def _forgotten_moments(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Optimizer, "load_state", lambda self, arrays: None)


def _wrong_product(patch: pytest.MonkeyPatch) -> None:
    right = quantized._matmul
    patch.setattr(quantized, "_matmul", lambda *arguments: 1.01 * right(*arguments))


def _wrong_normalizer(patch: pytest.MonkeyPatch) -> None:
    right = loglikelihood.logsumexp
    patch.setattr(loglikelihood, "logsumexp", lambda logits: right(logits) + 0.01)


def _wrong_planner(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(self_checks, "run_side", lambda *_: {**PEAKS, "predicted_peak_bytes": 50})


BROKEN = {
    "gradients": (_wrong_softmax, "gradients, full: = float32 on the CPU"),
    "packed rows": (_leaking_segments, "step, rows packed = apart"),
    "compiled step": (_rounding_compiler, "step, compiled = eager"),
    "resume": (_forgotten_moments, "run, resumed = uninterrupted"),
    "quantized layers": (_wrong_product, "logits, 4 bits: = dequantized"),
    "scorers": (_wrong_normalizer, "log-likelihoods = plain scorer"),
    "memory": (_wrong_planner, "peak memory, lora: predicted = measured"),
}


@pytest.mark.parametrize("title", CHECKS)
def test_a_broken_piece_is_off(place: Place, title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks, line = BROKEN[title]
    monkeypatch.setattr("mlx_slim.bench.self_test.shutil.which", lambda name: name)
    breaks(monkeypatch)
    assert _status(place, title)[line] == "off"


def test_not_a_number_is_off_and_an_error_is_a_line(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_: Place) -> Iterator[Deviation]:
        yield Deviation("nothing", float("nan"), 1.0)
        yield Deviation("speed", float("nan"), None, "tokens/s")
        raise ValueError(f"cannot read {place.model}")

    lines: list[str] = []
    results = self_test._run("some check", check, place, lines.append)
    assert [(one.check, one.measured, one.status) for one in results] == [
        ("nothing", None, "off"),
        ("speed", None, "off"),
        ("some check", None, "off"),
    ]
    assert results[-1].note == "ValueError" and str(place.model) in lines[0]


def test_without_a_compiler_the_compiled_step_is_skipped(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_slim.bench.self_test.shutil.which", lambda name: None)
    assert _status(place, "compiled step") == {"compiled step": "skipped"}


# ---------------------------------------------------------------------------- the command


def _only(monkeypatch: pytest.MonkeyPatch, *titles: str) -> None:
    monkeypatch.setattr(self_test, "CHECKS", {title: CHECKS[title] for title in titles})


def test_the_record_names_nobody_and_no_place(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    _only(monkeypatch, *(title for title in CHECKS if title != "compiled step"))
    file = tmp_path / "self-test.json"
    assert run(["doctor", "--self-test", "--json", "-o", str(file)]) == 0
    text = file.read_text()
    assert text == capsys.readouterr().out
    record = json.loads(text)
    assert record["ok"] and record["schema_version"] == 1
    assert {check["status"] for check in record["checks"]} == {"ok", ""}
    assert record["machine"]["device"]["dtype"] in ("float32", "bfloat16")
    for secret in (getpass.getuser(), platform.node(), str(Path.home()), str(tmp_path), "/tmp"):
        assert secret not in text
    assert not [word for word in text.split('"') if word.startswith(("/", "~", "file:"))]


def test_what_is_off_ends_with_exit_code_1_and_its_row(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    _only(monkeypatch, "scorers", "memory")
    _wrong_normalizer(monkeypatch)
    file = tmp_path / "self-test.json"
    assert run(["doctor", "--self-test", "-o", str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.startswith("log-likelihoods = plain"))
    assert "off" in row and "nats" in row
    assert lines[-1] == "off: log-likelihoods = plain scorer"
    assert not json.loads(file.read_text())["ok"]


def test_a_file_that_exists_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(self_test, "self_test", lambda report: pytest.fail("measured"))
    file = tmp_path / "self-test.json"
    file.write_text("mine")
    assert run(["doctor", "--self-test", "-o", str(file)]) == 2
    assert "exists already" in capsys.readouterr().err and file.read_text() == "mine"
    assert run(["doctor", "-o", str(tmp_path / "other.json")]) == 2
    assert "--self-test" in capsys.readouterr().err
