"""``generate`` and ``chat`` from the command line."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.cli.main import run
from tests.support.adapters import write_adapter
from tests.support.tiny import tiny_model


def test_generate_prints_the_answer_alone(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(tiny("llama")), "--prompt", "hello", "--max-tokens", "5"]
    assert run(words) == 0
    first = capsys.readouterr()
    assert "prompt tokens" in first.err
    assert "prompt tokens" not in first.out
    assert run(words) == 0
    assert capsys.readouterr().out == first.out


def test_a_seed_decides_what_is_sampled(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "generate",
        str(tiny("llama")),
        "--prompt",
        "hello",
        "--max-tokens",
        "8",
        "--temp",
        "2",
    ]
    outputs = []
    for seed in ("1", "1", "2"):
        assert run([*words, "--seed", seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_draft_and_a_quantized_cache_are_reported_and_keep_the_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny_model(tmp_path / "model", head_dim=32))
    words = ["generate", model, "--prompt", "hello", "--max-tokens", "9", "--kv-bits", "8"]
    assert run(words) == 0
    plain = capsys.readouterr()
    assert "proposed tokens" not in plain.err
    assert run([*words, "--draft-model", model, "--num-draft-tokens", "2"]) == 0
    drafted = capsys.readouterr()
    assert drafted.out == plain.out
    assert "proposed tokens accepted (" in drafted.err
    assert "x the speed without it" in drafted.err
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/exit\n"))
    assert run(["chat", model, "--max-tokens", "9", "--draft-model", model]) == 0
    assert "proposed tokens accepted (" in capsys.readouterr().err


def test_generate_reads_standard_input(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", str(tiny("llama")), "--max-tokens", "5", "--prompt"]
    assert run([*words, "hello"]) == 0
    typed = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert run([*words, "-"]) == 0
    assert capsys.readouterr().out == typed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "x", "--system", "y", "--no-chat-template"], "--system needs"),
        (["--prompt", "x", "--max-tokens", "0"], "--max-tokens"),
        (["--prompt", "x", "--temp", "-1"], "--temp"),
        (["--prompt", "x", "--adapter", "no-such-folder"], "no-such-folder"),
        (["--prompt", "x", "--kv-bits", "3"], "'--kv-bits': '3' is not one of '8', '4'"),
        (["--prompt", "x", "--kv-bits", "8"], "expected a multiple of 32"),
        (["--prompt", "x", "--draft-model", "no-such-folder"], "no-such-folder"),
        (["--prompt", "x", "--num-draft-tokens", "0"], "--num-draft-tokens"),
        ([], "--prompt"),
    ],
)
def test_bad_input_of_generate_is_one_line(
    words: Any, message: str, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", str(tiny("llama")), *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.out == ""


def test_an_absent_model_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(["generate", str(tmp_path / "absent"), "--prompt", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_base_model_continues_but_takes_no_system_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny_model(tmp_path / "base", "llama", chat_template=None))
    assert run(["generate", folder, "--prompt", "once", "--max-tokens", "3"]) == 0
    assert run(["generate", folder, "--prompt", "once", "--system", "be brief"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_chat_holds_a_conversation_and_its_commands(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "hello\n/reset\nhello\n/rest\n\n/exit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    words = ["chat", str(tiny("llama")), "--max-tokens", "6", "--temp", "0"]
    assert run(words) == 0
    captured = capsys.readouterr()
    assert "new conversation" in captured.err
    assert "did you mean '/reset'?" in captured.err
    half = len(captured.out) // 2
    assert captured.out[:half] == captured.out[half:]  # after /reset the answer is the same
    assert captured.out


def test_chat_ends_with_its_input(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert run(["chat", str(tiny("llama")), "--max-tokens", "3", "--system", "be brief"]) == 0
    assert capsys.readouterr().out


def test_adapters_are_summed_and_switched(
    tiny: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    base = str(tiny("llama"))
    one, other = (
        write_adapter(tmp_path / name, tiny("llama"), size=0.3) for name in ("one", "other")
    )
    zero = ["--adapter", f"{one}=0.5", "--adapter", f"{one}=-0.5"]
    words = ["generate", base, "--prompt", "hello", "--max-tokens", "6"]
    outputs = []
    for options in ([], zero, ["--adapter", str(one)]):
        assert run([*words, *options]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert run([*words, "--adapter", f"{other}=x"]) == 2
    assert "is not a number" in capsys.readouterr().err
    lines = ["hello", "/reset", f"/adapter {one}", "hello", "/reset", "/adapter none", "hello"]
    lines = "\n".join([*lines, "/adapter nowhere\n"])
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert run(["chat", base, "--max-tokens", "6", "--temp", "0"]) == 0
    captured = capsys.readouterr()
    answers = captured.out
    assert captured.err.count("the conversation continues") == 2
    assert "nowhere is not an adapter folder" in captured.err
    alone = outputs_of_chat(base, monkeypatch, capsys)
    assert answers.startswith(alone) and answers.endswith(alone)
    assert answers != alone * 3


def outputs_of_chat(
    base: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert run(["chat", base, "--max-tokens", "6", "--temp", "0"]) == 0
    return capsys.readouterr().out


def test_a_base_model_does_not_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny_model(tmp_path / "base", "llama", chat_template=None))
    assert run(["chat", folder]) == 2
    assert "hint: it is a base model" in capsys.readouterr().err
