"""Tokens of the rows of a recipe, estimated from the first ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.planner.memory import Prediction, predict
from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS
from mlx_slim.planner.work import Speed, TrainingWork, expected_work
from tests.support.planner import recipe


def test_tokens_are_guessed_from_the_rows_that_will_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the rows are too long, the columns that nobody reads are longer still."""
    monkeypatch.setenv("MLX_SLIM_DATA", str(tmp_path))
    rows = [
        {"prompt": "p" * 43, "completion": "c" * (43 if i % 2 else 4300), "text": "t" * 9000}
        for i in range(400)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    as_array = tmp_path / "rows.json"
    as_array.write_text(json.dumps(rows, indent=1))

    def tokens(path: Path = file, distill: dict[str, Any] | None = None, **data: Any) -> int:
        values = {"path": str(path), "template": "plain", "validation": 0, **data}
        with_teacher: dict[str, Any] = {"distill": distill} if distill else {}
        train = {"max_length": 256, "epochs": 1}
        work = expected_work(recipe(data=values, train=train, **with_teacher))
        assert work is not None
        return work.tokens

    assert tokens() == tokens(as_array) == 200 * 21
    assert tokens(validation=50) == 150 * 21
    assert tokens(validation=0.5) == tokens(max_rows=200) == 100 * 21
    assert tokens(template="auto") == 200 * 60
    assert tokens(truncation="right") == 200 * (21 + 256)
    two = {"teachers": [{"model": "a"}, {"model": "b"}], "ask": {"max_tokens": 100}}
    assert tokens(distill={**two, "method": "logits"}) == 200 * 21
    assert tokens(distill={**two, "method": "sequence"}) == 200 * 3 * 21
    assert tokens(distill={**two, "method": "sequence", "weight": 1}) == 200 * 2 * 21
    assert tokens(distill={**two, "method": "rationales"}) == 200 * (21 + 2 * 121)
    part = expected_work(
        recipe(
            data={
                "path": [{"path": str(file), "skip": 100, "limit": 100}],
                "template": "plain",
                "validation": 0,
            },
            train={"max_length": 256, "epochs": 2},
        )
    )
    assert part is not None and part.tokens == 2 * 50 * 21


def test_only_what_is_learned_is_counted_as_supervised(tmp_path: Path) -> None:
    """The last of three answers, rows without one left out, and what a turn's weight says."""

    def chat(*answers: dict[str, Any]) -> dict[str, Any]:
        turns: list[dict[str, Any]] = []
        for keys in answers:
            turns += [{"role": "user", "content": "u" * 430}]
            turns += [{"role": "assistant", "content": "a" * 430, **keys}]
        return {"messages": turns}

    file = tmp_path / "rows.jsonl"

    def work(*rows: dict[str, Any], **data: Any) -> TrainingWork:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {"path": str(file), "template": "plain", "validation": 0, **data}
        prediction = expected_work(recipe(data=values, train={"max_length": 1024, "epochs": 1}))
        assert prediction is not None
        return prediction

    three = [chat({}, {}, {})] * 8
    assert work(*three).supervised == pytest.approx(300 / 601, rel=0.01)
    assert work(*three, learn="last").supervised == pytest.approx(100 / 601, rel=0.01)
    assert work(*three).tokens == work(*three, learn="last").tokens == 8 * 601
    first = [chat({}, {"weight": 0})] * 8  # nothing is left to learn but the first answer
    assert work(*first).tokens == 8 * 401
    assert work(*three, *first, learn="last").tokens == 8 * 601
    assert work({"text": "t" * 430}, format="text").supervised == 1


def test_texts_are_counted_as_the_rows_that_they_are_split_into(tmp_path: Path) -> None:
    """100 tokens in rows of 32 with 8 of context: 32 and three of 32, the last shorter."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": "t" * 430}) + "\n" for _ in range(10)))

    def work(**data: Any) -> TrainingWork | None:
        values = {"path": str(file), "template": "plain", "validation": 0, **data}
        train = {"max_length": 32, "epochs": 1}
        return expected_work(recipe(data={"split_overlap": 8, **values}, train=train))

    split = work()
    assert split is not None
    total = int(430 / 4.3) + 1
    assert split.tokens == 10 * (total + 3 * 8)
    assert split.supervised == pytest.approx(total / (total + 24))
    assert work(split=False) is None  # all are dropped
    held = work(validation=5)  # texts, not rows
    assert held is not None and held.tokens == split.tokens // 2


def test_what_all_rows_begin_with_shortens_the_run_and_not_its_memory(tmp_path: Path) -> None:
    def predicted(system: str | None, **train: object) -> Prediction:
        file = tmp_path / "rows.jsonl"
        row = {"completion": "yes", **({"system": system} if system else {})}
        file.write_text("".join(json.dumps({**row, "prompt": f"{i}?"}) + "\n" for i in range(40)))
        plan = recipe(data={"path": str(file), "validation": 0}, train={"epochs": 1, **train})
        config = SHIPPED_CONFIGS["HuggingFaceTB/SmolLM2-135M-Instruct"]
        speed = Speed(1e10, 1e-9, 1e-9)
        return predict(config, plan, gpu=False, speed=speed, suggest=False)

    words = "One of a thousand words. " * 60  # about 350 tokens
    once, always = predicted(words), predicted(words, prefix_sharing=False)
    assert once.tokens == always.tokens
    assert once.predicted_peak_bytes == always.predicted_peak_bytes
    assert (once.predicted_seconds or 0) < 0.5 * (always.predicted_seconds or 0)
    packed = predicted(words, batching="packed").predicted_seconds or 0
    assert packed > 1.5 * (once.predicted_seconds or 0)
    plain = predicted(None, prefix_sharing=False)
    assert predicted(None).predicted_seconds == plain.predicted_seconds
