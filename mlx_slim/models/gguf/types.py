"""Which block format each tensor of a GGUF file gets.

Invariant: ``Q4_K_M`` and ``Q5_K_M`` are mixed as llama.cpp's own quantizer mixes them, and a row
that is no multiple of a format's block falls back to the format that it takes there: Q4_K to Q5_0,
Q5_K to Q5_1, Q6_K to Q8_0, and F16 where no multiple of 32 is left. Any other type is one format
for all matrices. Vectors are F32. Try it: ``mlx-slim export MODEL --to gguf --type q4_k_m -o DIR``.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from mlx_slim.errors import SlimError, did_you_mean

# type -> (block format of its matrices, name of the file's type in llama.cpp)
_TYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q6_k": ("Q6_K", "MOSTLY_Q6_K"),
    "q5_k_m": ("Q5_K", "MOSTLY_Q5_K_M"),
    "q5_k": ("Q5_K", "MOSTLY_Q5_K_S"),
    "q5_1": ("Q5_1", "MOSTLY_Q5_1"),
    "q5_0": ("Q5_0", "MOSTLY_Q5_0"),
    "q4_k_m": ("Q4_K", "MOSTLY_Q4_K_M"),
    "q4_k": ("Q4_K", "MOSTLY_Q4_K_S"),
    "q4_1": ("Q4_1", "MOSTLY_Q4_1"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}
TYPES = tuple(_TYPES)
_MIXED = ("q4_k_m", "q5_k_m")
K_FORMATS = ("Q4_K", "Q5_K", "Q6_K")
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_BLOCK, _LARGE_BLOCK = 32, 256  # weights of a block, of a K format
_TENSOR = re.compile(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """What of a model decides its mix.

    Attributes:
        layers: Blocks.
        tied: The embedding is the head too.
        shared_values: llama.cpp's 70B: 80 blocks whose heads share values.
    """

    layers: int
    tied: bool
    shared_values: bool


def check_type(kind: str) -> None:
    """Refuse a type that is none of ``TYPES``."""
    if kind not in _TYPES:
        raise SlimError(f"unknown GGUF type {kind!r}", f"{did_you_mean(kind, TYPES)}")


def file_type(kind: str) -> str:
    """Return llama.cpp's name of the type of a file."""
    return _TYPES[kind][1]


def block_formats(
    kind: str, tensors: dict[str, Shape], shapes: Shapes
) -> tuple[dict[str, str], list[str]]:
    """Return the block format of each tensor, and notes on those that fell back.

    Args:
        kind: One of ``TYPES``.
        tensors: GGUF's names and shapes, outermost first.
        shapes: Of the model.
    """
    formats: dict[str, str] = {}
    fallen: Counter[tuple[int, str, str]] = Counter()
    for name, shape in tensors.items():
        target = _format(kind, name, shape, shapes)
        formats[name] = fitting(target, shape[-1])
        if formats[name] != target:
            fallen[shape[-1], target, formats[name]] += 1
    notes = [
        f"{count} tensor{'s' if count > 1 else ''} of rows of {columns:,}, no multiple of "
        f"{_LARGE_BLOCK if target in K_FORMATS else _BLOCK}: {stored} instead of {target}"
        for (columns, target, stored), count in sorted(fallen.items())
    ]
    return formats, notes


def fitting(target: str, columns: int) -> str:
    """Return ``target``, or what takes its place for rows of ``columns``."""
    if target in K_FORMATS and columns % _LARGE_BLOCK:
        target = _FALLBACK[target]
    return target if target in ("F32", "F16") or columns % _BLOCK == 0 else "F16"


def _format(kind: str, name: str, shape: Shape, shapes: Shapes) -> str:
    base = _TYPES[kind][0]
    if len(shape) == 1:
        return "F32"
    if kind not in _MIXED:
        return base
    if name == ("token_embd.weight" if shapes.tied else "output.weight"):
        return "Q6_K"
    match = _TENSOR.fullmatch(name)
    if match and _takes_more(int(match[1]), shapes.layers):
        return "Q6_K"
    if match and match[2] == "attn_v" and shapes.shared_values and base == "Q4_K":
        return "Q5_K"
    return base


def _takes_more(layer: int, layers: int) -> bool:
    """Return whether values and down projection of a block get more bits.

    They do in the first and in the last eighth, and in every third block between.
    """
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
