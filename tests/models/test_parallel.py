"""Which numbers of ranks divide a model, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.nn as nn
import pytest

from mlx_slim.errors import SlimError
from mlx_slim.models.build import build
from mlx_slim.models.load import read_config
from mlx_slim.models.parallel import (
    Split,
    agreed_sampler,
    divided_by,
    largest,
    rank_counts,
    why_not,
)
from tests.support.adapters import write_quantized

Tiny = Callable[..., Path]


def model(folder: Path) -> nn.Module:
    return build(read_config(folder))


def refusal(folder: Path, how: Split, ranks: int) -> str:
    error = why_not(model(folder), how, ranks)
    assert isinstance(error, SlimError)
    return str(error)


def test_the_numbers_of_ranks_that_divide_heads_and_columns(tiny: Tiny) -> None:
    assert rank_counts(model(tiny("llama-mha"))) == [2, 4]  # 4 heads
    assert rank_counts(model(tiny("llama"))) == [2]  # 2 key-value heads


def test_heads_that_the_ranks_do_not_divide_are_one_line(tiny: Tiny) -> None:
    text = refusal(tiny("llama"), "tensor", 3)
    assert "3 ranks do not divide the 4 heads, 2 key-value heads" in text
    assert "ranks that divide it: 2" in text
    assert "try --parallel pipeline" in refusal(tiny("qwen2"), "tensor", 3)


def test_groups_of_a_quantized_layer_stay_whole(tiny: Tiny, tmp_path: Path) -> None:
    packed = write_quantized(tmp_path / "packed", tiny("llama-mha"))  # 64 columns: 2 groups of 32
    assert rank_counts(model(packed)) == [2]
    assert "2 quantization groups of o_proj" in refusal(packed, "tensor", 4)


@pytest.mark.parametrize(
    ("kind", "how", "text"),
    [
        ("phi", "tensor", "mlx-lm's phi has no tensor parallelism (each rank needs the whole"),
        ("llama", "pipeline", "llama has no pipeline parallelism (try --parallel tensor)"),
    ],
)
def test_a_family_without_it_is_one_line(tiny: Tiny, kind: str, how: Split, text: str) -> None:
    assert text in refusal(tiny(kind), how, 2)


def test_a_pipeline_has_no_more_stages_than_blocks(tiny: Tiny) -> None:
    assert why_not(model(tiny("qwen2")), "pipeline", 3) is None
    assert "4 ranks cannot divide 3 blocks" in refusal(tiny("qwen2"), "pipeline", 4)


def test_a_whole_model_agrees_on_nothing(tiny: Tiny) -> None:
    whole = model(tiny("llama"))
    assert divided_by(whole) is None and largest(whole, 3) == 3
    assert agreed_sampler(max, whole) is max  # type: ignore[arg-type]
