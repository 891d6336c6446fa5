"""Two evaluations side by side: what may be compared, and what the comparison says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.artifacts import hash_file, write_json
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.comparison import compare
from mlx_slim.evaluation.results import encode, samples_name
from mlx_slim.evaluation.stats import detectable_difference

COMPARED_KEYS = {"task_version": 1, "num_fewshot": 0, "limit": None, "rows_sha256": "r"}


def finished(out: Path, records: dict[str, list[dict[str, Any]]], **changes: Any) -> Path:
    """Write a finished evaluation; ``changes`` go into its first task's section."""
    out.mkdir()
    results: dict[str, Any] = {"model": out.name, "adapter": None, "dtype": "float32", "tasks": {}}
    for task, rows in records.items():
        (out / samples_name(task)).write_bytes(encode(rows))
        metrics = [name for name in ("acc", "acc_norm") if name in rows[0]]
        section = {
            **COMPARED_KEYS,
            "n": len(rows),
            "metrics": {name: {"value": 0.5} for name in metrics},
        }
        section["samples_sha256"] = hash_file(out / samples_name(task))
        if task == "perplexity":
            results[task] = {**section, "bytes": 1000}
        else:
            results["tasks"][task] = section | (changes if not results["tasks"] else {})
    write_json(out / "results.json", results)
    return out


def answers(right: str, **more: Any) -> list[dict[str, Any]]:
    """Return records that are right where ``right`` has a 1."""
    return [{"doc_id": i, "acc": int(bit), **more} for i, bit in enumerate(right)]


def test_flips_both_ways_and_the_difference(tmp_path: Path) -> None:
    a = finished(tmp_path / "a", {"toy": answers("1111100000" * 6)})
    b = finished(tmp_path / "b", {"toy": answers("0111110000" * 6)})
    comparison = compare(a, b)
    (row,) = comparison.rows
    assert (comparison.first, comparison.second) == ("a", "b")
    assert (row.paired.gained, row.paired.lost) == (6, 6)
    assert row.gained == [5, 15, 25, 35, 45, 55]
    assert row.lost == [0, 10, 20, 30, 40, 50]
    assert row.paired.delta == 0
    assert row.verdict.startswith("no detectable difference (MDE ")
    better = finished(tmp_path / "c", {"toy": answers("1111111100" * 6)})
    assert compare(a, better).rows[0].verdict == "higher by 30 points"
    assert compare(better, a).rows[0].verdict == "lower by 30 points"


def test_holm_is_over_the_tasks_first_metrics(tmp_path: Path) -> None:
    def both(acc: str, norm: str) -> list[dict[str, Any]]:
        pairs = zip(acc, norm, strict=True)
        return [{"doc_id": i, "acc": int(x), "acc_norm": int(y)} for i, (x, y) in enumerate(pairs)]

    one, two = "1" * 20 + "0" * 20, "0" * 9 + "1" * 31
    a = finished(tmp_path / "a", {"x": both(one, one), "y": answers(one)})
    b = finished(tmp_path / "b", {"x": both(one, two), "y": answers(two)})
    rows = {(row.task, row.metric): row for row in compare(a, b).rows}
    assert rows["x", "acc"].p_holm is None
    assert rows["x", "acc"].verdict == ""
    for key in (("x", "acc_norm"), ("y", "acc")):
        assert rows[key].p_holm == pytest.approx(min(1.0, 2 * rows[key].paired.p_value))


def test_parts_are_resampled_apart(tmp_path: Path) -> None:
    rows = [answers("1" * 20, subject="s"), answers("0" * 20, subject="t")]
    first = [*rows[0], *({**row, "doc_id": row["doc_id"] + 20} for row in rows[1])]
    second = [{**row, "acc": 1} for row in first]
    a = finished(tmp_path / "a", {"toy": first})
    b = finished(tmp_path / "b", {"toy": second})
    assert compare(a, b).rows[0].paired.bootstrap == (0.5, 0.5)


def test_text_is_compared_in_bits_per_byte(tmp_path: Path) -> None:
    def windows(nats: float) -> list[dict[str, Any]]:
        return [
            {"doc_id": 0, "window": i, "tokens": 9, "loglikelihood": -nats * (10 + i)}
            for i in range(8)
        ]

    a = finished(tmp_path / "a", {"toy": answers("10"), "perplexity": windows(2.0)})
    b = finished(tmp_path / "b", {"toy": answers("10"), "perplexity": windows(2.5)})
    row = compare(a, b).rows[-1]
    assert (row.metric, row.unit) == ("bits_per_byte", "bits/byte")
    assert row.paired.delta == pytest.approx(0.5 * 108 / math.log(2) / 1000)
    assert row.verdict == "higher by 0.0779 bits/byte"
    same = finished(tmp_path / "c", {"toy": answers("10"), "perplexity": windows(2.0)})
    assert compare(a, same).rows[-1].verdict == "no difference in any part"


def test_a_text_of_several_documents_is_paired_by_document(tmp_path: Path) -> None:
    def windows(nats: list[float]) -> list[dict[str, Any]]:
        return [
            {"doc_id": doc_id, "window": 2 * doc_id + i, "tokens": 9, "loglikelihood": -x * (i + 1)}
            for doc_id, x in enumerate(nats)
            for i in range(2)
        ]

    first, second = [10.0, 14.0, 9.0, 20.0], [11.0, 14.5, 9.5, 22.0]
    a = finished(tmp_path / "a", {"perplexity": windows(first)})
    b = finished(tmp_path / "b", {"perplexity": windows(second)})
    size = json.loads((a / "results.json").read_text())["perplexity"]["bytes"]
    (row,) = compare(a, b).rows
    per_byte = 3 / math.log(2) / size
    assert row.paired.n == 4  # documents, not the eight windows
    assert row.paired.first == pytest.approx(sum(first) * per_byte)
    assert row.paired.delta == pytest.approx((sum(second) - sum(first)) * per_byte)
    assert row.paired.bootstrap[0] <= row.paired.delta <= row.paired.bootstrap[1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rows_sha256": "x"}, "toy.rows_sha256: 'r' → 'x'"),
        ({"shots_sha256": "x"}, "toy.shots_sha256: None → 'x'"),
        ({"num_fewshot": 5}, "toy.num_fewshot: 0 → 5"),
        ({"task_version": 2}, "toy.task_version: 1 → 2"),
        ({"limit": 2}, "toy.limit: None → 2"),
        ({"definition_sha256": "d"}, "toy.definition_sha256"),
    ],
)
def test_questions_of_other_settings_are_refused(tmp_path: Path, change: Any, text: str) -> None:
    a = finished(tmp_path / "a", {"toy": answers("10")})
    b = finished(tmp_path / "b", {"toy": answers("10")}, **change)
    with pytest.raises(SlimError, match="cannot be compared") as caught:
        compare(a, b)
    assert text in caught.value.message


def test_other_questions_are_refused(tmp_path: Path) -> None:
    a = finished(tmp_path / "a", {"toy": answers("10")})
    b = finished(tmp_path / "b", {"toy": answers("10")[::-1]})
    with pytest.raises(SlimError, match="different questions"):
        compare(a, b)


def test_settings_and_tasks_that_differ_are_noted(tmp_path: Path) -> None:
    a = finished(tmp_path / "a", {"toy": answers("10"), "more": answers("11")})
    b = finished(tmp_path / "b", {"toy": answers("10")})
    results = json.loads((b / "results.json").read_text())
    write_json(b / "results.json", {**results, "dtype": "bfloat16"})
    notes = compare(a, b).notes
    assert f"more: only in {a}" in notes
    assert "settings differ: dtype: 'float32' → 'bfloat16'" in notes


def test_what_is_not_there_or_damaged_is_one_line(tmp_path: Path) -> None:
    a = finished(tmp_path / "a", {"toy": answers("10")})
    b = finished(tmp_path / "b", {"other": answers("10")})
    with pytest.raises(SlimError, match="no task in common"):
        compare(a, b)
    with pytest.raises(SlimError, match=r"holds no results\.json"):
        compare(a, tmp_path / "nowhere")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "eval.json").write_text("{}")
    with pytest.raises(SlimError, match="not complete"):
        compare(tmp_path / "half", a)
    c = finished(tmp_path / "c", {"toy": answers("10")})
    (c / "results.json").write_text('{"models": 1}')
    with pytest.raises(SlimError, match="is not a result of"):
        compare(a, c)
    d = finished(tmp_path / "d", {"toy": answers("10")})
    samples = d / "samples_toy.jsonl"
    samples.write_text(samples.read_text().replace('"acc": 1', '"acc": 0'))
    with pytest.raises(SlimError, match="was changed after"):
        compare(a, d)
    samples.write_text("{")
    with pytest.raises(SlimError, match="damaged"):
        compare(a, d)
    samples.unlink()
    with pytest.raises(SlimError, match="does not exist"):
        compare(a, d)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"acc": 1}, "line 2 has no 'doc_id'"),
        ({"doc_id": "1", "acc": 1}, "line 2: doc_id is '1', expected a whole number"),
        ({"doc_id": 1}, "line 2 has no 'acc'"),
        ({"doc_id": 1, "acc": 10**9}, "line 2: acc is 1000000000, expected a number from 0 to 1"),
        ({"doc_id": 1, "acc": True}, "line 2: acc is True"),
        ({"doc_id": 1, "acc": [1]}, r"line 2: acc is \[1\]"),
        ({"doc_id": 1, "acc": 1, "loglikelihoods": []}, "loglikelihoods is"),
        ({"doc_id": 1, "acc": 1, "loglikelihoods": [None]}, "loglikelihoods.0. is None"),
        ({"doc_id": 1, "acc": 1, "subject": 3}, "subject is 3"),
        ({"doc_id": 1, "acc": 1, "subject": "law"}, "some questions have a subject"),
    ],
)
def test_answers_that_cannot_be_counted_are_refused(tmp_path: Path, record: Any, text: str) -> None:
    a = finished(tmp_path / "a", {"toy": answers("10")})
    b = finished(tmp_path / "b", {"toy": [*answers("1"), record]})
    with pytest.raises(SlimError, match=text):
        compare(a, b)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": None}, r"results\.json: model is None"),
        ({"tasks": {"toy": []}}, "tasks.'toy'. is .., expected an object"),
        ({"tasks": {"toy": {"metrics": {}}}}, "'toy' has no 'n'"),
        ({"tasks": {"toy": {"n": 2, "metrics": 3}}}, "metrics is 3"),
        ({"tasks": {"../toy": {"n": 2, "metrics": {}}}}, "is not the name of a task"),
        ({"perplexity": []}, "perplexity is"),
        ({"perplexity": {"n": 1, "bytes": 0}}, "bytes is 0, expected a whole number from 1"),
    ],
)
def test_results_that_are_none_are_refused(tmp_path: Path, change: Any, text: str) -> None:
    a = finished(tmp_path / "a", {"toy": answers("10")})
    b = finished(tmp_path / "b", {"toy": answers("10")})
    write_json(b / "results.json", json.loads((b / "results.json").read_text()) | change)
    with pytest.raises(SlimError, match=text):
        compare(a, b)


def test_chance_and_the_corrected_level_are_stated(tmp_path: Path) -> None:
    guesses = {"loglikelihoods": [-1.0, -2.0]}
    names = ("x", "y", "z")
    a = finished(tmp_path / "a", {t: answers("10" * 30, **guesses) for t in names})
    b = finished(tmp_path / "b", {t: answers("01" * 5 + "10" * 25, **guesses) for t in names})
    comparison = compare(a, b)
    row = comparison.rows[0]
    assert row.chance == 0.5
    assert row.paired.detectable == detectable_difference(10, 60, tests=3)
    assert (
        comparison.notes[0]
        == "x: neither A nor B is detectably above the chance level of 50.0 points"
    )
    good = finished(tmp_path / "c", {"x": answers("1" * 55 + "0" * 5, **guesses)})
    assert compare(good, a).notes[-1].startswith("x: B is not detectably above")
    answer = {"generation": "so"}
    c = finished(tmp_path / "d", {"x": answers("1" + "0" * 59, **answer)})
    assert compare(c, c).rows[0].chance == 0.0
    assert not compare(c, c).notes
