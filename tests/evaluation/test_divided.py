"""Models divided over real ranks: the scores, the answers and the memory of a rank."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.divided import chosen_split, rank_bytes
from mlx_slim.models.load import read_config
from tests.evaluation.divided_ranks import CASES
from tests.support.adapters import write_adapter, write_quantized
from tests.support.ranks import started_ranks
from tests.support.tiny import tiny_model

Case = dict[str, Any]
RANKS = 2
SCRIPT = "from tests.evaluation.divided_ranks import main; main()"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    # Blocks outweigh the ends, and both ranks get as many.
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    for name in ("llama", "qwen2"):
        tiny_model(folder / name, name, **wide)
    write_quantized(folder / "packed", folder / "llama")
    write_adapter(folder / "lora", folder / "llama", size=0.2)
    write_adapter(folder / "other", folder / "llama", size=0.1, rank=4)
    write_adapter(folder / "dora", folder / "qwen2", dora=True, size=0.2)
    for rank in range(RANKS):
        shutil.copytree(folder / "llama", folder / f"half-{rank}")
        tiny_model(folder / f"seed-{rank}", "llama", seed=rank)
        row = {"prompt": "one", "completion": f"answer {rank}"}
        (folder / f"rows-{rank}.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    (folder / "half-1" / "model-00002-of-00002.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def cases(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Case]]:
    """What each rank says of each case."""
    with started_ranks(tmp_path_factory.mktemp("ring"), RANKS, SCRIPT, models) as ranks:
        outputs = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * RANKS, outputs
    rows = [[json.loads(line) for line in out.splitlines()] for out, _ in outputs]
    return [{row["case"]: row for row in rank} for rank in rows]


@pytest.mark.parametrize("name", CASES)
def test_scores_and_answers_are_those_of_the_whole_model(
    cases: list[dict[str, Case]], name: str
) -> None:
    for rank in cases:
        assert rank[name]["gap"] < 1e-3
        assert rank[name]["same_answers"]


@pytest.mark.parametrize("name", CASES)
def test_a_rank_holds_its_part_and_one_tensor(cases: list[dict[str, Case]], name: str) -> None:
    for rank in cases:
        one = rank[name]
        if not one["dense"] and name != "packed":
            assert one["part"] <= one["whole"] / RANKS + one["ends"]
        assert one["part"] < one["whole"] or one["dense"]
        # A slice that is smaller by at most 16 kB than its tensor keeps it (mx.contiguous).
        assert one["active"] <= one["part"] + 16384 * one["tensors"]
        # a block's MLP (swiglu's comparison), or a tensor, its update and their sum
        assert one["peak"] <= one["active"] + 8 * one["largest"]


def test_a_stage_reads_its_own_blocks_only(cases: list[dict[str, Case]]) -> None:
    for rank in cases:
        one = rank["pipeline"]
        # its blocks, config and tokenizer; and one block's MLP, to try a CPU's forward pass
        assert one["part"] <= one["read"] <= 1.02 * one["part"] + 3 * one["largest"] + 100_000


def test_the_other_ranks_follow_rank_0(cases: list[dict[str, Case]]) -> None:
    first, second = (rank["chat"] for rank in cases)
    assert len(first["answers"]) == 2 and second["answers"] == []
    assert "start again with another --adapter" in first["switch"]


def test_rank_0_serves_and_the_others_compute_along(cases: list[dict[str, Case]]) -> None:
    first, second = (rank["served"] for rank in cases)
    *texts, seeded = first["answers"]
    assert len(texts) == 2 and "error" not in "".join(texts)
    assert "a seed is not there for a model that is divided over ranks" in seeded
    assert second["answers"] == []
    assert "serve over several ranks has one model without adapters" in first["adapter"]
    assert second["adapter"] == "exit 2"


def test_ranks_agree_before_they_compute(cases: list[dict[str, Case]]) -> None:
    first, second = (rank["agreement"] for rank in cases)
    assert first["memory"] == second["memory"] == 500  # of one machine
    assert (first["fits"], first["larger"]) == (None, "tensor")
    assert "the ranks disagree on mlx" in first["versions"]
    assert "mlx: rank 0: 0.0; rank 1: 0.1" in first["versions"]
    assert second["versions"] == "exit 2"
    assert first["broken"] == "exit 2"
    assert second["broken"].startswith("rank 1 (")
    assert "here is one prompt at a time" in first["data"]


def test_ranks_with_another_model_of_the_same_size_do_not_answer(
    cases: list[dict[str, Case]],
) -> None:
    first, second = (rank["agreement"] for rank in cases)
    for case, fact in (
        ("weights", "the model's files"),
        ("adapter", "the adapters"),
        ("way", "--parallel"),
    ):
        assert first[case].startswith(f"the ranks disagree on {fact}")
        assert second[case] == "exit 2"


def test_ranks_with_other_rows_are_refused(cases: list[dict[str, Case]]) -> None:
    first, second = (rank["unlike"] for rank in cases)
    assert first["train"].startswith("the ranks disagree on the recipe, the rows ")
    assert re.search(r"the rows: rank 0: \w{12}; rank 1: \w{12}$", first["train"])
    assert second["train"] == "exit 2"


def test_the_machines_of_ranks_are_compared_and_timed(cases: list[dict[str, Case]]) -> None:
    first, second = (rank["unlike"]["machines"] for rank in cases)
    assert first == second
    assert [one["rank"] for one in first["ranks"]] == [0, 1]
    assert [one["fact"] for one in first["differences"]] == ["the recipe", "the rows"]
    link = first["link"]
    assert link["latency_us"] > 0 and link["megabytes_per_second"] > 0
    assert link["gradient_bytes"] > 0 and link["gradient_seconds"] > 0


def test_one_rank_has_nothing_to_divide(models: Path) -> None:
    config = read_config(models / "llama")
    assert chosen_split("auto", config, fits=False, questions=True) is None
    with pytest.raises(SlimError, match="divides a model over ranks, here is one"):
        chosen_split("tensor", config, fits=True, questions=True)


def test_what_is_outside_the_blocks_is_on_every_rank() -> None:
    assert rank_bytes({"model.embed_tokens.weight": 7, "model.layers.0.mlp.weight": 5}) == 12
