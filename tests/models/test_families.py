"""Model classes that differ from the common ones: they load, pack, share and run in threads."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_slim.bench.model_case import build_case
from mlx_slim.bench.small_configs import small_config
from mlx_slim.config.load import from_values
from mlx_slim.errors import SlimError
from mlx_slim.events import Broadcast
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.attention import reads_other_blocks
from mlx_slim.models.build import build
from mlx_slim.models.load import load
from mlx_slim.models.reference import reference_of
from mlx_slim.models.structure import supports_packing
from mlx_slim.threads import run_in_threads

IDS = mx.array([[7 * i % 256 for i in range(20)]])
mx.eval(IDS)  # threads read it


def model_of(model_type: str, folder: Path) -> Any:
    return load(build_case(model_type, folder).model).model.eval()


def test_a_head_of_another_name_is_not_tied(tmp_path: Path) -> None:
    loaded = load(build_case("internlm2", tmp_path).model)  # its head is called output
    assert loaded.config["tie_word_embeddings"] is False
    assert any(note.startswith("output.weight is present") for note in loaded.notes)


def test_a_class_that_needs_scaling_gets_it() -> None:
    assert build(small_config("minicpm3"))  # reads the factors of its rotary embedding


@pytest.mark.parametrize("model_type", ["pixtral", "muse_glimmer"])
def test_a_reference_of_another_part_is_none(model_type: str) -> None:
    reference = reference_of(small_config(model_type))
    assert not reference.from_transformers
    assert len(reference.rope) == len(reference.windows) == 4


@pytest.mark.parametrize("model_type", ["minimax", "iquestloopcoder", "gemma3n", "phixtral"])
def test_caches_reach_the_blocks_that_ask_for_them(model_type: str, tmp_path: Path) -> None:
    """Caches by name, as many as the model makes, each with the keys of its block."""
    model = model_of(model_type, tmp_path)
    cached = model(IDS, cache=make_prompt_cache(model))
    assert mx.allclose(model(IDS), cached, atol=1e-5)
    assert supports_packing(model) is (model_type != "iquestloopcoder")


@pytest.mark.parametrize("model_type", ["gemma3n", "afm7", "gemma4", "llama"])
def test_blocks_that_read_keys_of_others_are_not_checkpointed(
    model_type: str, tmp_path: Path
) -> None:
    case = build_case(model_type, tmp_path)
    values = {
        "model": str(case.model),
        "method": "full",
        "data": {"path": str(tmp_path / "rows.jsonl"), "validation": 0},
        "train": {"steps": 1, "grad_checkpoint": True},
        "report_answers": 0,
    }
    refuses = model_type in ("gemma3n", "afm7")
    assert reads_other_blocks(load(case.model).model) is refuses
    with pytest.raises(SlimError, match="lost by checkpointing") if refuses else nullcontext():
        finetune(from_values(values, "small", "test"), case.new(), observer=Broadcast([]))


def test_a_forward_pass_writes_no_weights_and_runs_in_threads(tmp_path: Path) -> None:
    model = model_of("gemma3n", tmp_path)
    altup = model.model.language_model.layers[0].altup
    weight = altup.prediction_coefs.weight

    def forward(length: int) -> mx.array:
        logits = model(IDS[:, :length])
        mx.eval(logits)
        return logits

    results = run_in_threads(forward, [(length,) for length in (20, 7, 12, 9)], 2)
    assert altup.prediction_coefs.weight is weight
    assert mx.allclose(results[1], results[0][:, :7], atol=1e-5)
