"""Headers of safetensors files: each entry fits its place, or one line says which not."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.artifacts import load_tensors
from mlx_slim.tensor_files import safetensors_header
from tests.test_reading import nested, refusal


def safetensors(path: Path, header: Any, data: bytes = b"\0" * 16) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ([], "tensor 'w' is []"),
        ({**GOOD, "dtype": 5}, "dtype is 5"),
        ({**GOOD, "shape": [-1, 4]}, "shape is [-1, 4]"),
        ({**GOOD, "shape": [True, 4]}, "shape is [True, 4]"),
        ({**GOOD, "shape": None}, "shape is None"),
        ({**GOOD, "shape": [2**40, 4]}, "shape is [1099511627776, 4]"),
        ({**GOOD, "shape": [1000, 1000]}, "in 16 bytes, expected 4,000,000"),
        ({**GOOD, "data_offsets": [16, 0]}, "data_offsets is [16, 0]"),
        ({**GOOD, "data_offsets": [0]}, "data_offsets is [0]"),
        ({**GOOD, "data_offsets": [0, 16.0]}, "data_offsets is [0, 16.0]"),
        ({**GOOD, "data_offsets": [-16, 0]}, "data_offsets is [-16, 0]"),
        ({**GOOD, "data_offsets": [16, 32]}, "truncated or corrupt"),
    ],
)
def test_a_header_that_does_not_fit_its_file(tmp_path: Path, entry: Any, expected: str) -> None:
    file = safetensors(tmp_path / "model.safetensors", {"w": entry})
    for read in (safetensors_header, load_tensors):
        actual = refusal(read, file)
        assert "model.safetensors" in actual
        assert expected in actual


def test_headers_that_are_no_objects(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    assert "is not an object" in refusal(safetensors_header, safetensors(file, []))
    assert "nested deeper" in refusal(safetensors_header, safetensors(file, nested(5000).encode()))
    text = json.dumps({"w": GOOD})
    twice = f"{text[:-1]}, {text[1:]}".encode()
    assert "'w' twice" in refusal(safetensors_header, safetensors(file, twice))
    file.write_bytes(b"\xff" * 7)
    assert "corrupt" in refusal(safetensors_header, file)


def test_a_good_header(tmp_path: Path) -> None:
    file = safetensors(tmp_path / "a.safetensors", {"__metadata__": {"format": "pt"}, "w": GOOD})
    stored = safetensors_header(file)["w"]
    assert (stored.dtype, stored.shape, stored.nbytes) == ("F32", (2, 2), 16)
    assert stored.begin + stored.nbytes == file.stat().st_size
    assert load_tensors(file)["w"].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    "places", [([0, 16], [0, 16]), ([0, 16], [4, 8]), ([0, 8], [4, 16]), ([8, 16], [0, 12])]
)
def test_tensors_that_share_bytes_are_refused(tmp_path: Path, places: Any) -> None:
    def entry(place: list[int]) -> dict:
        return {"dtype": "F32", "shape": [(place[1] - place[0]) // 4], "data_offsets": place}

    header = {name: entry(place) for name, place in zip("ab", places, strict=True)}
    file = safetensors(tmp_path / "model.safetensors", header)
    actual = refusal(load_tensors, file)
    assert "model.safetensors is corrupt: the tensors" in actual and "share bytes" in actual
    header = {"a": entry([0, 8]), "empty": entry([8, 8]), "b": entry([8, 16])}
    assert set(safetensors_header(safetensors(file, header))) == {"a", "b", "empty"}
