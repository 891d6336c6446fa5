"""Which tensor gets which format: the counts that llama.cpp prints when it loads such files."""

from __future__ import annotations

from collections import Counter

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.models.gguf.types import Shapes, block_formats, check_type, fitting

HIDDEN, FEED = 4096, 11008


def _tensors(layers: int, tied: bool = False, hidden: int = HIDDEN) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (32000, hidden)}
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"):
            tensors[f"blk.{layer}.{name}.weight"] = (hidden, hidden)
        tensors[f"blk.{layer}.ffn_down.weight"] = (hidden, FEED)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = (hidden,)
    tensors["output_norm.weight"] = (hidden,)
    return tensors if tied else {**tensors, "output.weight": (32000, hidden)}


@pytest.mark.parametrize(
    ("layers", "tied", "shared", "counts"),
    [
        (32, False, False, {"F32": 65, "Q4_K": 193, "Q6_K": 33}),  # Llama 2 7B, Mistral 7B
        (28, True, False, {"F32": 57, "Q4_K": 168, "Q6_K": 29}),  # Qwen2.5 1.5B
        (80, False, True, {"F32": 161, "Q4_K": 441, "Q5_K": 40, "Q6_K": 81}),  # Llama 2 70B
    ],
)
def test_q4_k_m_is_mixed_as_llama_cpp_mixes_it(
    layers: int, tied: bool, shared: bool, counts: dict[str, int]
) -> None:
    shapes = Shapes(layers, tied, shared)
    formats, notes = block_formats("q4_k_m", _tensors(layers, tied), shapes)
    assert Counter(formats.values()) == counts and not notes
    assert formats["token_embd.weight" if tied else "output.weight"] == "Q6_K"
    higher = {name for name, kind in formats.items() if kind == "Q6_K"}
    assert {"blk.0.attn_v.weight", f"blk.{layers - 1}.ffn_down.weight"} <= higher
    assert formats["blk.0.attn_q.weight"] == "Q4_K"


def test_rows_of_no_multiple_of_256_fall_back_as_in_llama_cpp() -> None:
    formats, notes = block_formats("q4_k_m", _tensors(8, True, 576), Shapes(8, True, False))
    assert formats["token_embd.weight"] == formats["blk.0.attn_v.weight"] == "Q8_0"
    assert formats["blk.0.attn_q.weight"] == "Q5_0"
    assert formats["blk.0.ffn_down.weight"] == "Q6_K"
    assert formats["blk.1.ffn_down.weight"] == "Q4_K"
    counted = Counter(formats.values())
    assert notes == [
        f"{counted['Q5_0']} tensors of rows of 576, no multiple of 256: Q5_0 instead of Q4_K",
        f"{counted['Q8_0']} tensors of rows of 576, no multiple of 256: Q8_0 instead of Q6_K",
    ]
    assert fitting("Q5_K", 576) == "Q5_1" and fitting("Q4_K", 512) == "Q4_K"
    assert fitting("Q4_K", 100) == fitting("Q4_1", 100) == "F16" and fitting("F32", 100) == "F32"


@pytest.mark.parametrize("kind", ["q4_k", "q6_k", "q5_1", "q8_0", "f16"])
def test_other_types_are_one_format(kind: str) -> None:
    formats, _ = block_formats(kind, _tensors(4), Shapes(4, False, False))
    assert set(formats.values()) == {"F32", kind.upper()}


def test_an_unknown_type_is_one_line() -> None:
    with pytest.raises(SlimError, match="unknown GGUF type 'q4_k_x'") as caught:
        check_type("q4_k_x")
    assert "q4_k" in caught.value.hint
