"""What an evaluation says of its prompts, and refuses of its rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.artifacts import load_tensors
from mlx_slim.cli.main import run
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.events import Notice
from tests.support.evals import write_tasks
from tests.support.runs import Recorder
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_tasks(tmp_path_factory.mktemp("tasks"), 12)[:2]


@pytest.mark.parametrize(
    ("place", "longest", "num_questions", "words"),
    [
        (0, 70, 36, "prompts (one a choice) were cut on the left to 70 tokens"),
        (1, 36, 12, "prompts were cut on the left to 24 tokens, which leaves 12 for the answer"),
    ],
)
def test_prompts_that_were_cut_are_reported(
    tiny: Callable[..., Path],
    tasks: Any,
    tmp_path: Path,
    place: int,
    longest: int,
    num_questions: int,
    words: str,
) -> None:
    options = EvalOptions(max_length=longest, num_fewshot=0)
    name = tasks[place].stem
    for resume in (False, True):  # the second time all is there already
        recorder = Recorder()
        (result,) = evaluate(
            str(tiny("llama")),
            str(tasks[place]),
            tmp_path / "out",
            options,
            resume=resume,
            observer=recorder,
        )
        cut = result["tasks"][name]["truncated"]
        assert 0 < cut < num_questions
        warnings = [
            e.message for e in recorder.events if isinstance(e, Notice) and e.level == "warning"
        ]
        assert warnings == [f"{name}: {cut} of {num_questions} {words}"]


def test_the_console_says_it_in_every_mode_and_not_without_a_cut(
    tiny: Callable[..., Path], tasks: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(tiny("llama")), "--task", str(tasks[1])]
    for mode in ("", "--quiet", "--json"):
        out = tmp_path / f"cut{mode}"
        arguments = [*words, "--max-length", "36", "-o", str(out), *filter(None, [mode])]
        assert run(arguments) == 0
        printed = "".join(capfd.readouterr())
        assert printed.count("of 12 prompts were cut on the left to 24 tokens") == 1, mode
    assert run([*words, "-o", str(tmp_path / "whole")]) == 0
    assert "cut" not in "".join(capfd.readouterr()).replace(str(tmp_path), "")


def test_an_empty_choice_is_refused_before_anything_is_written(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "?", "a": "x", "b": " "}))
    (tmp_path / "mine.yaml").write_text(
        "kind: multiple_choice\ndata: {path: rows.jsonl}\nprompt: '{{ q }}'\nmetrics: [acc]\n"
        "choices: ['{{ a }}', '{{ b }}']\ntarget: 0\n"
    )
    with pytest.raises(SlimError, match=r"rows.jsonl, line 1: choice 2 of 2 is empty \(' '\)"):
        evaluate(str(tiny("llama")), str(tmp_path / "mine.yaml"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_choice_that_the_tokenizer_does_not_see_is_named(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "?"}))
    (tmp_path / "mine.yaml").write_text(
        "kind: multiple_choice\ndata: {path: rows.jsonl}\nprompt: '{{ q }}'\n"
        "choices: [x, '~']\ntarget: 0\ndelimiter: ''\n"
    )
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny("llama").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    record = json.loads((model / "tokenizer.json").read_text())
    record["normalizer"] = {"type": "Replace", "pattern": {"String": "~"}, "content": ""}
    (model / "tokenizer.json").write_text(json.dumps(record))
    with pytest.raises(
        SlimError, match="mine, question 0: the continuation '~' of '\\?' has no tok"
    ):
        evaluate(str(model), str(tmp_path / "mine.yaml"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_score_that_is_no_number_leaves_nothing(tasks: tuple[Path, Path], tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", shards=1)
    file = next(model.glob("*.safetensors"))
    tensors = load_tensors(file)
    tensors["model.norm.weight"] = mx.full(tensors["model.norm.weight"].shape, 3e38)  # overflows
    mx.save_safetensors(str(file), tensors)
    with pytest.raises(SlimError, match="question 0"):
        evaluate(model, str(tasks[0]), tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
