"""Headlines say no more than their numbers bear: intervals, chance, the plain word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_slim.artifacts import read_json, write_json
from mlx_slim.compare.report import report
from tests.support.matrix import answer, write_matrix

TASK = {"hellaswag": 100}


def answered(folder: Path, right: dict[str, int]) -> dict[str, Any]:
    """Let each cell get so many questions right, the first ones; return the report."""
    for cell, k in right.items():
        answer(folder, cell, "hellaswag", k)
    return report(folder).results


def test_one_more_right_answer_of_a_hundred_lifts_nothing(tmp_path: Path) -> None:
    folder = write_matrix(tmp_path / "m", methods=("base", "lora"), questions=TASK)
    first, last = answered(folder, {"toy0-base": 40, "toy0-lora-s0": 41})["headline"]
    assert first == (
        "LoRA has 41.0 points, the untrained base 40.0 (score, chance 25.0): no detectable "
        "difference, +1.0 (interval −1.7 to +3.7, MDE 7.8)."
    )
    assert "7.8 points on hellaswag (n=100)" in last
    first, _ = answered(folder, {"toy0-base": 40, "toy0-lora-s0": 48})["headline"]
    assert first == (
        "LoRA lifts the untrained base from 40.0 to 48.0 points (score, chance 25.0): +8.0 "
        "(interval +2.3 to +13.4, corrected p = .008)."
    )


def test_the_table_and_the_headline_hold_to_one_level(tmp_path: Path) -> None:
    folder = write_matrix(tmp_path / "m", methods=("base", "lora", "dora", "qlora"), questions=TASK)
    right = {"toy0-base": 40, "toy0-lora-s0": 46, "toy0-dora-s0": 41, "toy0-qlora-s0": 40}
    results = answered(folder, right)
    row = next(c for c in results["contrasts"] if c["second"] == "toy0-lora-s0")
    claim = next(c for c in results["claims"] if c["second"]["cells"] == ["toy0-lora-s0"])
    # Six more of 100 are p = .031 alone and nothing among five comparisons.
    assert row["p_value"] < 0.05 < row["p_holm"] == claim["p_holm"]
    assert row["family"] == claim["tests"] == len(results["contrasts"]) == 5
    assert row["verdict"] == claim["verdict"] == "no detectable difference (MDE 10 points)"
    assert row["detectable"] == claim["detectable"]
    retention, best, _ = results["headline"]
    assert "the best of 3 methods (selected on these questions" in best
    assert "no detectable difference, +6.0" in best
    assert retention.startswith(
        "4-bit QLoRA keeps 87% (interval 73% to 101%) of LoRA's score; 71% ("
    )
    assert "of what is above chance: 40.0 of 46.0 points, chance 25.0; no detectable" in retention


def test_at_the_chance_level_retention_is_not_measured(tmp_path: Path) -> None:
    folder = write_matrix(tmp_path / "m", methods=("base", "lora", "qlora"), questions=TASK)
    right = {"toy0-base": 24, "toy0-lora-s0": 26, "toy0-qlora-s0": 25}
    results = answered(folder, right)
    retention, best, _ = results["headline"]
    assert retention.startswith(
        "LoRA has 26.0 points (score), not detectably above chance (25.0): how much of it 4-bit "
        "QLoRA keeps (25.0 points) cannot be measured"
    )
    assert "%" not in retention.split("; ")[0]
    assert "chance 25.0, which 26.0 is not detectably above" in best
    claim = next(c for c in results["claims"] if c["what"] == "kept")
    assert claim["ratio_above_chance"] is None and not claim["first"]["above_chance"]


@pytest.mark.parametrize(
    "methods",
    [("lora",), ("lora", "qlora"), ("quantized",), ("fused",), ("quantized", "qlora", "fused")],
)
def test_a_matrix_without_a_base_is_reported(tmp_path: Path, methods: Any) -> None:
    folder = write_matrix(tmp_path / "m", methods=methods)
    results = report(folder).results
    assert any("no untrained base" in line for line in results["headline"])
    assert "interval" in results["headline"][0] and "chance 16.7" in results["headline"][0]
    assert not any(c["why"] == "against the base" for c in results["contrasts"])
    for name in ("report.html", "report.md"):
        assert "no untrained base" in (folder / name).read_text()


def test_several_models_and_seeds(tmp_path: Path) -> None:
    folder = write_matrix(tmp_path / "m", models=2, seeds=2, methods=("base", "lora"))
    results = report(folder).results
    assert [line.split(": ")[0] for line in results["headline"][:2]] == ["toy0", "toy1"]
    assert results["headline"][0].startswith("toy0: LoRA lifts the untrained base from")
    claim = results["claims"][0]
    assert claim["second"]["cells"] == ["toy0-lora-s0", "toy0-lora-s1"]
    # One claim over tasks and seeds, and six rows of the table.
    assert claim["tests"] == 7 and claim["tasks"] == ["hellaswag", "gsm8k", "mmlu"]
    low, high = claim["interval"]
    assert low < claim["delta"] < high
    assert claim["delta"] == pytest.approx(claim["second"]["value"] - claim["first"]["value"])


def test_too_few_questions_to_detect_anything(tmp_path: Path) -> None:
    folder = write_matrix(tmp_path / "m", methods=("base", "lora"), questions={"hellaswag": 4})
    results = answered(folder, {"toy0-base": 0, "toy0-lora-s0": 4})
    assert "too few questions to detect any" in results["headline"][0]
    assert results["contrasts"][0]["detectable"] is None
    assert "none on hellaswag (n=4)" in results["headline"][-1]


@pytest.mark.parametrize("right", [0, 1, 100])
def test_equal_answers_are_no_certainty(tmp_path: Path, right: int) -> None:
    """All right, all wrong, never another answer: the intervals still have a width."""
    folder = write_matrix(tmp_path / "m", methods=("base", "lora", "qlora"), questions=TASK)
    names = ("toy0-base", "toy0-lora-s0", "toy0-qlora-s0")
    results = answered(folder, dict.fromkeys(names, right))
    assert "no detectable difference, +0.0 (interval −2" in " ".join(results["headline"])
    for claim in results["claims"]:
        low, high = claim["first"]["interval"]
        assert 0 <= low < high <= 1
        assert claim["interval"][0] < 0 < claim["interval"][1]


def test_measured_memory_decides_no_word(tmp_path: Path) -> None:
    folder = write_matrix(tmp_path / "m")
    before = report(folder).results["headline"]
    for path in folder.glob("cells/*/cell.json"):
        cell = read_json(path)
        if cell["train"]:
            cell["train"]["peak_memory_bytes"] *= 3 if "qlora" in path.parent.name else 1
            write_json(path, cell)
    assert report(folder).results["headline"] == before
