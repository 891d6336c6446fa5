"""Teachers that write: which requests they get, what is cached, dropped and learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.config.load import from_values
from mlx_slim.config.schema import Recipe
from mlx_slim.data.split import choose_validation
from mlx_slim.distillation import generate as phase
from mlx_slim.distillation.dataset import DistillationDataset
from mlx_slim.errors import SlimError
from mlx_slim.events import Notice
from tests.models.test_tokenizer import with_tokens
from tests.support.endpoint import answers, completion, serving
from tests.support.runs import Recorder, run_until_killed, write_rows
from tests.support.tiny import tiny_model


def recipe(
    rows: Path, base_url: str, method: str = "rationales", count: int = 1, **distill: Any
) -> Recipe:
    teachers = [
        {"model": "m", "name": f"t{n}", "base_url": base_url, "weight": float(n)}
        for n in range(1, count + 1)
    ]
    values = {
        "model": "not-needed-here",
        "data": {"path": str(rows), "validation": 3, "template": "plain"},
        "distill": {
            "method": method,
            "teachers": teachers,
            "ask": {"retries": 0, "max_tokens": 32},
            **distill,
        },
    }
    return from_values(values, "small", "test").recipe


def generate_dataset(config: Recipe, *words: Any) -> DistillationDataset:
    assert config.distill is not None
    return phase.generate_dataset(config, config.distill.teachers, *words)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 12)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rationales_of_two_teachers_stand_behind_their_prefixes(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with serving() as served:
        dataset = generate_dataset(
            recipe(rows, served.base_url, count=2), "rationales", out, Recorder()
        )
    assert dataset.loss_weights == [1.0, 1.0, 2.0]
    assert [part.group for part in dataset.files] == [0, 1, 2]
    from_data, first, second = (lines(out / part.file) for part in dataset.files)
    validation = lines(out / "dataset" / "validation.jsonl")
    assert (len(from_data), len(first), len(second), len(validation)) == (9, 9, 9, 3)
    for data, one, two in zip(from_data, first, second, strict=True):
        assert one["prompt"] == f"[rationale 1] {data['prompt']}"
        assert two["prompt"] == f"[rationale 2] {data['prompt']}"
        assert one["completion"].startswith("Because it has")
    sent = [request["messages"][0]["content"] for request in served.requests]
    assert len(sent) == 18
    for row in validation:  # no teacher was asked about these, no student learns them
        assert not [text for text in sent if text.startswith(row["prompt"] + "\n")]
        assert row["id"] not in {data["id"] for data in from_data}
    assert all(f"Correct answer: {row['completion']}" in "".join(sent) for row in from_data)


def test_sequences_take_the_place_of_answers(rows: Path, tmp_path: Path) -> None:
    with serving() as served:
        config = recipe(rows, served.base_url, "sequence", count=2, weight=0.75)
        dataset = generate_dataset(config, "sequence", tmp_path / "run", Recorder())
    assert dataset.loss_weights == [
        0.25,
        0.25,
        0.5,
    ]  # 1 − λ, and λ by the teachers' weights 1 and 2
    from_data, first, _ = (lines(tmp_path / "run" / part.file) for part in dataset.files)
    assert [row["prompt"] for row in first] == [row["prompt"] for row in from_data]
    assert all(row["completion"].startswith("Because") for row in first)
    sent = [request["messages"] for request in served.requests[:9]]
    assert sorted(m[0]["content"] for m in sent) == sorted(row["prompt"] for row in from_data)


def test_with_weight_one_only_the_teacher_counts(rows: Path, tmp_path: Path) -> None:
    with serving() as served:
        config = recipe(rows, served.base_url, "sequence", weight=1.0)
        dataset = generate_dataset(config, "sequence", tmp_path / "run", Recorder())
    assert [part.group for part in dataset.files] == [1]


def test_a_row_that_a_teacher_cannot_read_is_named(tmp_path: Path) -> None:
    """Its tokenizer gives a token that its embedding has no row for."""
    base = with_tokens(tiny_model(tmp_path / "model"), "<|tool|>")
    validation = choose_validation(3, 12, 0).tolist()
    bad = next(i for i in range(9, -1, -1) if i not in validation)
    rows = [{"prompt": f"row {i}" + " <|tool|>" * (i == bad), "completion": "x"} for i in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for method in ("sequence", "rationales"):
        config = recipe(path, "", method, teachers=[{"model": str(base), "name": "wide"}])
        with pytest.raises(SlimError) as caught:
            generate_dataset(config, method, tmp_path / method, Recorder())
        assert caught.value.message.startswith(f"{path.name}, line {bad + 1}, for teacher wide: ")
        assert "the token '<|tool|>' has the id 264" in caught.value.message


def test_a_complete_phase_asks_no_teacher_again(rows: Path, tmp_path: Path) -> None:
    with serving() as served:
        config = recipe(rows, served.base_url)
        first = generate_dataset(config, "rationales", tmp_path / "run", Recorder())
    again = generate_dataset(config, "rationales", tmp_path / "run", Recorder())  # nobody serves
    assert again == first


def test_useless_answers_are_counted_and_not_learned(rows: Path, tmp_path: Path) -> None:
    def script(number: int, body: dict[str, Any]):
        text = body["messages"][0]["content"]
        if "1: " in text:
            return 200, completion("  "), {}
        if "2: " in text:
            return 200, completion("and so on", "length"), {}
        if "3: " in text:
            return 200, completion("so it is because " * 20), {}
        return answers(number, body)

    seen = Recorder()
    with serving(script) as served:
        config = recipe(rows, served.base_url)
        dataset = generate_dataset(config, "rationales", tmp_path / "run", seen)
    (report,) = dataset.teachers
    dropped = {reason: entry.count for reason, entry in report.dropped.items()}
    used = lines(tmp_path / "run" / dataset.files[1].file)
    assert set(dropped) <= {"empty", "cut at the longest answer", "repeats itself"} and dropped
    assert report.used == len(used) == 9 - sum(dropped.values())
    (warning,) = [e.message for e in seen.events if isinstance(e, Notice) and e.level == "warning"]
    assert warning.startswith(f"t1: {len(used)} of 9 answers used (")
    assert "empty" in warning or "cut" in warning or "repeats" in warning


def test_nothing_usable_is_an_error_that_keeps_the_answers(rows: Path, tmp_path: Path) -> None:
    with (
        serving(lambda *_: (200, completion(""), {})) as served,
        pytest.raises(SlimError, match=r"t1: 0 of 9 answers used \(9 empty\)") as caught,
    ):
        generate_dataset(recipe(rows, served.base_url), "rationales", tmp_path / "run", Recorder())
    assert "max_tokens" in caught.value.hint
    assert len(lines(tmp_path / "run" / "answers.jsonl")) == 9


def test_a_hand_edit_is_used_and_counted(rows: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "run", Recorder()
    with serving() as served:
        config = recipe(rows, served.base_url)
        generate_dataset(config, "rationales", out, Recorder())
        stored = lines(out / "answers.jsonl")
        stored[4]["generation"] = "I know better."
        (out / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in stored))
        count = len(served.requests)
        dataset = generate_dataset(config, "rationales", out, seen)
        assert len(served.requests) == count
    rows_of_teacher = lines(out / dataset.files[1].file)
    assert [r["completion"] for r in rows_of_teacher].count("I know better.") == 1
    assert any("1 edited by hand" in getattr(event, "message", "") for event in seen.events)
    assert dataset.teachers[0].edited == 1


def test_everything_is_checked_before_the_first_question(rows: Path, tmp_path: Path) -> None:
    def refuse() -> None:
        raise AssertionError("not ready")

    with serving() as served:
        for ask, what in (
            ({"prompt": "{{ nothing }}"}, "'nothing' is undefined"),
            ({}, "KEY_THAT_IS_NOT_SET is not set"),
        ):
            config = recipe(rows, served.base_url, count=2, ask=ask)
            assert config.distill is not None
            if not ask:
                keyed = config.distill.teachers[1].model_copy(
                    update={"api_key_env": "KEY_THAT_IS_NOT_SET"}
                )
                teachers = [config.distill.teachers[0], keyed]
                distill = config.distill.model_copy(update={"teachers": teachers})
                config = config.model_copy(update={"distill": distill})
            with pytest.raises(SlimError, match=what):
                generate_dataset(config, "rationales", tmp_path / "run", Recorder(), refuse)
        assert served.requests == []


def test_a_cache_is_shared_between_runs(rows: Path, tmp_path: Path) -> None:
    with serving() as served:
        config = recipe(rows, served.base_url, cache=str(tmp_path / "cache"))
        generate_dataset(config, "rationales", tmp_path / "one", Recorder())
        count = len(served.requests)
        generate_dataset(config, "rationales", tmp_path / "two", Recorder())
        assert len(served.requests) == count == 9
    assert not (tmp_path / "one" / "answers.jsonl").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from mlx_slim.distillation.answers import AnswerFile
from tests.support.runs import Recorder
from tests.distillation.test_generate import generate_dataset, recipe

append, calls = AnswerFile.append, []

def dying(self, *words):
    calls.append(1)
    if len(calls) == 5:
        with self.path.open("ab") as handle:
            handle.write(b'{"id": "rows.jsonl:')
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, *words)

AnswerFile.append = dying
rows, base_url, out = sys.argv[1:4]
generate_dataset(recipe(Path(rows), base_url, count=2), "rationales", Path(out), Recorder())
"""


def test_killed_and_resumed_gives_the_same_file(rows: Path, tmp_path: Path) -> None:
    with serving() as served:
        config = recipe(rows, served.base_url, count=2)
        generate_dataset(config, "rationales", tmp_path / "straight", Recorder())
        out = tmp_path / "killed"
        run_until_killed(KILLED, rows, served.base_url, out)
        assert not (out / "dataset.json").exists()
        generate_dataset(config, "rationales", out, Recorder())
    for name in ("answers.jsonl", "dataset/0-data.jsonl", "dataset/0-2-t2.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
