"""The GGUF container: metadata and tensors, read straight from the file.

Invariant: every length is checked against the file before it is believed, so a truncated or foreign
file is one clear error and never a crash; Q4_0, Q4_1, Q8_0, F16, BF16 and F32 come out exactly as
stored, other block formats are dequantized. Try it: ``mlx-slim convert model.gguf -o DIR``.

Shapes: R rows, C columns, G = C/32 groups.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_slim.errors import SlimError
from mlx_slim.reading import GGUFMetadata, exists, field, library_errors, open_regular, short, shown
from mlx_slim.tensor_files import check_apart

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9
_MAX_DEPTH, _MAX_DIMENSIONS, _MAX_ALIGN = 4, 4, 1 << 20
_MAX_TOKEN = 1000  # characters: each cut of a SentencePiece token in two is looked up
_AGAIN = "download or copy it again"
_KINDS: dict[str, type] = {
    "general.architecture": str,
    "general.alignment": int,
    "split.count": int,
    "split.no": int,
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    "tokenizer.ggml.add_bos_token": bool,
    "tokenizer.ggml.add_eos_token": bool,
    "tokenizer.ggml.add_space_prefix": bool,
    "tokenizer.chat_template": str,
}
_GROUP = 32


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies: type name (``Q4_1``), shape outermost first, byte offset and size."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A parsed GGUF file: metadata as Python values (numeric arrays as numpy) and its tensors.

    ``shards``: tensor name → the file that it is in, where the GGUF is split.
    """

    path: Path
    metadata: GGUFMetadata
    tensors: dict[str, GGUFTensor]
    shards: dict[str, Path] = dataclasses.field(default_factory=dict)

    def read(self, name: str) -> dict[str, mx.array]:
        """Return tensor ``name`` as MLX arrays.

        Returns:
            ``{"weight": (R, C)}`` for dense tensors (K-quants and the like in float16), or
            ``weight`` (R, C·bits/32) uint32 with ``scales`` and ``biases`` (R, G) float16; of the
            experts of a mixture with an axis of experts before.

        Raises:
            SlimError: If the block format cannot be dequantized.
        """
        tensor = self.tensors[name]
        with library_errors(f"{short(self.path)}: tensor {shown(name)} cannot be read"):
            return self._arrays(name, tensor)

    def _arrays(self, name: str, tensor: GGUFTensor) -> dict[str, mx.array]:
        path = self.shards.get(name, self.path)
        data = np.memmap(path, np.uint8, "r", tensor.offset, (tensor.nbytes,))
        if tensor.kind in _PACKED:
            rows = math.prod(tensor.shape[:-1])  # those of all experts, where there are several
            raw = np.asarray(data).reshape(rows, tensor.shape[-1] // _GROUP, -1)
            arrays = zip(("weight", "scales", "biases"), _PACKED[tensor.kind](raw), strict=True)
            return {leaf: mx.array(v.reshape(*tensor.shape[:-1], -1)) for leaf, v in arrays}
        if tensor.kind in ("F32", "F16"):
            dtype = np.dtype("<f4" if tensor.kind == "F32" else "<f2")
            return {"weight": mx.array(data.view(dtype).reshape(tensor.shape))}
        if tensor.kind == "BF16":
            bits = mx.array(data.view("<u2").reshape(tensor.shape))
            return {"weight": bits.view(mx.bfloat16)}
        return {"weight": mx.array(self._dequantize(name, tensor, data))}

    def _dequantize(self, name: str, tensor: GGUFTensor, data: np.ndarray) -> np.ndarray:
        from gguf import GGMLQuantizationType, dequantize

        rows = np.asarray(data).reshape(*tensor.shape[:-1], -1)
        try:
            values = dequantize(rows, GGMLQuantizationType[tensor.kind])
        except (NotImplementedError, ValueError) as error:
            raise SlimError(
                f"{self.path}: tensor {name} has the block format {tensor.kind}, which cannot be "
                "dequantized",
                "take a Q4_0, Q4_1, Q8_0, K-quant, F16 or F32 file of the model",
            ) from error
        return values.reshape(tensor.shape).astype(np.float16)


def _pack4(codes_RC: np.ndarray) -> np.ndarray:
    pairs = codes_RC[:, 0::2] | (codes_RC[:, 1::2] << 4)
    return np.ascontiguousarray(pairs).view("<u4")


def _nibbles(quants_RGB: np.ndarray) -> np.ndarray:
    """Sixteen bytes hold 32 codes: the low nibbles first, then the high ones."""
    codes = np.concatenate([quants_RGB & 0xF, quants_RGB >> 4], axis=-1)
    return codes.reshape(codes.shape[0], -1)


def _half(raw_RGB: np.ndarray, start: int) -> np.ndarray:
    return np.ascontiguousarray(raw_RGB[..., start : start + 2]).view("<f2")[..., 0]


def _q4_0(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scales = _half(raw, 0)  # w = d (q - 8)
    return _pack4(_nibbles(raw[..., 2:])), scales, scales * np.float16(-8)


def _q4_1(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _pack4(_nibbles(raw[..., 4:])), _half(raw, 0), _half(raw, 2)  # w = d q + m


def _q8_0(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scales = _half(raw, 0)  # w = d q with q signed; MLX codes are unsigned
    codes = np.ascontiguousarray(raw[..., 2:] ^ 0x80).reshape(raw.shape[0], -1)
    return codes.view("<u4"), scales, scales * np.float16(-128)


def pack_blocks(kind: str, layer: Any) -> np.ndarray | None:
    """Return the blocks (R, bytes) of a quantized MLX layer, code for code.

    Args:
        kind: ``Q4_0``, ``Q4_1`` or ``Q8_0``.
        layer: Holds ``weight``, ``scales`` and ``biases``, with its bits, group size and mode.

    Returns:
        None if the layer is not in that format: other bits or groups, scales that are no float16,
        or offsets that the format does not have.
    """
    if (layer.mode, layer.group_size, layer.bits) != ("affine", _GROUP, BITS.get(kind)):
        return None
    scales, biases = (np.array(layer[name].astype(mx.float32)) for name in ("scales", "biases"))
    expected = {"Q4_0": -8 * scales, "Q8_0": -128 * scales}.get(kind, biases)
    with np.errstate(over="ignore"):
        halves = [values.astype("<f2") for values in (scales, biases)]
    exact = all(np.array_equal(h, v) for h, v in zip(halves, (scales, biases), strict=True))
    if not exact or not np.array_equal(biases, expected):
        return None
    packed = np.array(layer["weight"]).view(np.uint8).reshape(*scales.shape, -1)
    if kind == "Q8_0":
        quants = packed ^ 0x80
    else:
        codes = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*scales.shape, _GROUP)
        quants = codes[..., : _GROUP // 2] | (codes[..., _GROUP // 2 :] << 4)
    heads = halves if kind == "Q4_1" else halves[:1]
    halves = [half[..., None].view(np.uint8) for half in heads]
    return np.concatenate([*halves, quants], axis=-1).reshape(scales.shape[0], -1)


_PACKED = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0}
BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}


class _Cursor:
    """Reads little-endian values from a buffer, never past its end."""

    def __init__(self, buffer: np.memmap, path: Path) -> None:
        self.buffer, self.path, self.at = buffer, path, 0

    def take(self, size: int) -> bytes:
        if size < 0 or self.at + size > len(self.buffer):
            raise SlimError(
                f"{self.path} is truncated: {len(self.buffer)} bytes end inside its header",
                "download or copy it again",
            )
        self.at += size
        return self.buffer[self.at - size : self.at].tobytes()

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise SlimError(f"{self.path} is corrupt: no metadata has the type {kind}", _AGAIN)
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[inner])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).copy()
        if count > len(self.buffer):
            self.take(count)
        if depth == _MAX_DEPTH:
            raise SlimError(f"{self.path} nests lists deeper than {_MAX_DEPTH}", _AGAIN)
        return [self.value(inner, depth + 1) for _ in range(count)]


def _check_metadata(metadata: GGUFMetadata, path: Path) -> None:
    """Check the types of what the container and its tokenizer say of themselves."""
    where = short(path)
    for key, kind in _KINDS.items():
        field(metadata, where, key, kind, None)
    align = field(metadata, where, "general.alignment", int, 32, low=1, high=_MAX_ALIGN)
    if align & (align - 1):
        raise SlimError(f"{where}: general.alignment is {align}, expected a power of two", _AGAIN)
    tokens = field(metadata, where, "tokenizer.ggml.tokens", list, [], of=str)
    field(metadata, where, "tokenizer.ggml.merges", list, [], of=str)
    if (longest := max(map(len, tokens), default=0)) > _MAX_TOKEN:
        raise SlimError(f"{where}: a token has {longest:,} characters, over {_MAX_TOKEN:,}", _AGAIN)
    for key, kinds in (("scores", "iuf"), ("token_type", "iu")):
        values = metadata.get(f"tokenizer.ggml.{key}")
        if values is None:
            continue
        if not isinstance(values, np.ndarray) or values.dtype.kind not in kinds:
            raise SlimError(
                f"{where}: tokenizer.ggml.{key} is {shown(values)}, expected numbers", _AGAIN
            )
        if len(values) != len(tokens) or not np.isfinite(values).all():
            raise SlimError(
                f"{where}: tokenizer.ggml.{key} has {len(values):,} values, NaN among them or not "
                f"one for each of {len(tokens):,} tokens",
                _AGAIN,
            )
    for key in metadata:
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            field(metadata, where, key, int, low=0, high=2**32 - 1)


def read_gguf(path: Path) -> GGUFFile:
    """Parse a GGUF file, versions 2 and 3; of a split one this part alone (``gguf_split.py``).

    Raises:
        SlimError: If it is absent, no GGUF file, truncated or of an unknown block format.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if not exists(path):
        raise SlimError(f"{path} does not exist", "give the path of a .gguf file")
    with open_regular(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        head = handle.read(8)
    version = int.from_bytes(head[4:8], "little")
    if head[:4] != b"GGUF" or size < 24:
        raise SlimError(f"{path} is not a GGUF file: it starts with {head[:4]!r}, not b'GGUF'")
    if version not in (2, 3):
        raise SlimError(
            f"{path} is GGUF version {version}, expected 2 or 3 (little-endian)",
            "convert it with a newer llama.cpp",
        )
    cursor = _Cursor(np.memmap(path, np.uint8, "r"), path)
    cursor.take(8)
    tensor_count, value_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: GGUFMetadata = {}
    for _ in range(value_count):
        key = cursor.string()
        if key in metadata:
            raise SlimError(f"{path} is corrupt: it has the metadata {shown(key)} twice", _AGAIN)
        metadata[key] = cursor.value(cursor.scalar("I"))
    _check_metadata(metadata, path)
    entries: list[tuple[str, str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name = cursor.string()
        dimensions = cursor.scalar("I")
        if dimensions > _MAX_DIMENSIONS:
            raise SlimError(
                f"{path}: tensor {shown(name)} has {dimensions:,} dimensions, "
                f"over {_MAX_DIMENSIONS}",
                _AGAIN,
            )
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
        kind, offset = cursor.scalar("I"), cursor.scalar("Q")
        try:
            quantization = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[quantization]
        except (ValueError, KeyError) as error:
            raise SlimError(
                f"{path}: tensor {shown(name)} has the unknown block format {kind}",
                "a newer gguf package may know it",
            ) from error
        fits = shape and shape[-1] % block == 0 and all(0 < one < 2**31 for one in shape)
        if not fits:
            raise SlimError(
                f"{path}: tensor {shown(name)} of {quantization.name} has the shape {list(shape)}",
                _AGAIN,
            )
        nbytes = math.prod(shape) // block * block_bytes
        entries.append((name, quantization.name, shape, offset, nbytes))
    align = metadata.get("general.alignment", 32)
    start = (cursor.at + align - 1) // align * align
    check_apart(path, [(at, at + size, name) for name, *_, at, size in entries])
    end = max((start + offset + nbytes for *_, offset, nbytes in entries), default=start)
    if end > size:
        raise SlimError(
            f"{path} is truncated: {size} bytes, its header says {end}",
            "download or copy it again",
        )
    tensors = {
        name: GGUFTensor(kind, shape, start + offset, nbytes)
        for name, kind, shape, offset, nbytes in entries
    }
    if len(tensors) < len(entries):
        raise SlimError(f"{path} is corrupt: it has two tensors of one name", _AGAIN)
    return GGUFFile(path, metadata, tensors)
