"""Parameters counted from shapes alone."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_slim.models.build import build
from mlx_slim.models.kinds import HEADS, HIDDEN, MLP
from mlx_slim.planner.shapes import leaves
from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS
from mlx_slim.pruning.counts import count
from mlx_slim.pruning.options import PruneOptions
from mlx_slim.pruning.plan import plan
from mlx_slim.pruning.surgery import config_with_sizes, config_without_layers

TINYLLAMA = SHIPPED_CONFIGS["TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"]
LLAMA = SHIPPED_CONFIGS["meta-llama/Llama-2-7b-hf"]
PHI = SHIPPED_CONFIGS["microsoft/phi-2"]
SMOL = SHIPPED_CONFIGS["HuggingFaceTB/SmolLM2-135M-Instruct"]


def _total(config: dict[str, Any]) -> int:
    return sum(value.size for _, value in leaves(build(config)))


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        (TINYLLAMA, {"ratio": 0.25, "uniform": False, "protect_first": 4, "protect_last": 4},
         945_907_712),
        (LLAMA, {"layers": "21-29"}, 4_916_965_376),
        (LLAMA, {"ratio": 0.5, "uniform": False}, 4_107_538_432),
    ],
)  # fmt: skip
def test_published_counts_hold_exactly(
    config: dict[str, Any], options: dict[str, Any], expected: int
) -> None:
    planned = plan(config, PruneOptions(**options), 2)
    assert planned.parameters == expected
    if planned.axis == "depth":
        assert _total(config_without_layers(config, planned.removed)) == expected
    else:
        assert _total(config_with_sizes(config, planned.sizes, uniform=False)) == expected


@pytest.mark.parametrize("config", [TINYLLAMA, PHI, SMOL])
def test_the_closed_form_is_what_is_built(config: dict[str, Any]) -> None:
    counts = count(build(config))
    assert counts.total == _total(config)
    d, heads = config["hidden_size"], config["num_attention_heads"]
    if config["model_type"] == "llama":
        size, kv = d // heads, config["num_key_value_heads"]
        closed = 2 * d * heads * size + 2 * d * kv * size + 3 * d * config["intermediate_size"]
        groups = sum(counts.groups[kind][3] * counts.sizes[kind][3] for kind in (HEADS, MLP))
        assert groups == closed
    sizes = {MLP: [1024] * config["num_hidden_layers"]}
    assert counts.with_sizes(sizes) == _total({**config, "intermediate_size": 1024})
    fewer = {**config, "num_hidden_layers": config["num_hidden_layers"] - 2}
    assert counts.without_layers([0, 7]) == _total(fewer)


GEMMA = {"model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 6,
         "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1,
         "head_dim": 256, "vocab_size": 1000}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        TINYLLAMA,
        SMOL,
        GEMMA,
        {**GEMMA, "tie_word_embeddings": False},
        {**SMOL, "attention_bias": True},
    ],
)
def test_the_width_of_the_residual_stream_is_counted_exactly(config: dict[str, Any]) -> None:
    counts = count(build(config))
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    kv_heads, neurons = config["num_key_value_heads"], config["intermediate_size"]
    for stays in ({HIDDEN: width - 64}, {HIDDEN: 64, MLP: 512}, {HIDDEN: 128, HEADS: 1}):
        sizes = {kind: [size] * layers for kind, size in stays.items()}
        size_of_head = config.get("head_dim") or width // config["num_attention_heads"]
        groups = config["num_attention_heads"] // kv_heads
        fewer = {
            "hidden_size": stays[HIDDEN],
            "head_dim": size_of_head,
            "intermediate_size": stays.get(MLP, neurons),
            "num_key_value_heads": stays.get(HEADS, kv_heads),
            "num_attention_heads": stays.get(HEADS, kv_heads) * groups,
        }
        assert counts.with_sizes(sizes) == _total({**config, **fewer})
        assert _total(config_with_sizes(config, sizes, uniform=True)) == counts.with_sizes(sizes)


def test_a_channel_of_a_llama_in_closed_form() -> None:
    """Embedding, head and last norm; two norms a layer; q, k, v, o; gate, up, down."""
    counts = count(build(TINYLLAMA))
    assert counts.channel == 2 * 32_000 + 1 + 22 * (2 + 2 * 2048 + 2 * 256 + 3 * 5632)
    planned = plan(TINYLLAMA, PruneOptions(hidden_size=1536), 2)
    assert planned.parameters == counts.total - 512 * counts.channel
