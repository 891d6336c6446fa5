"""Files written a tensor at a time: what any reader of safetensors sees in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_slim.hashing import hash_bytes
from mlx_slim.models.shards import open_shards, raw_bytes
from mlx_slim.models.tensors import INDEX, folder_tensors
from tests.support.memory import peak_of


class Odd(nn.Module):
    """Tensors of several dtypes and shapes: a scalar, an empty one, one that is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = mx.arange(6, dtype=mx.uint32).reshape(2, 3)
        self.turned = mx.arange(6, dtype=mx.float32).reshape(2, 3).T
        self.half = mx.array([1.5, -2.0], mx.bfloat16)
        self.one = mx.array(3.0)
        self.none = mx.zeros((0, 4), mx.float16)
        self.bytes = mx.array([1, 2, 255], mx.uint8)


def tensors_of(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]


def test_stock_readers_see_every_tensor_in_any_order_of_writing(tmp_path: Path) -> None:
    import safetensors

    model = Odd()
    tensors = tensors_of(model)
    for order in (sorted(tensors), sorted(tensors, reverse=True)):
        folder = tmp_path / order[0]
        folder.mkdir()
        with open_shards(folder, model) as shards:
            for name in order:
                shards.write(name, tensors[name])
        read: Any = mx.load(str(folder / "model.safetensors"))
        assert read.keys() == tensors.keys()
        for name, value in tensors.items():
            assert read[name].dtype == value.dtype and mx.array_equal(read[name], value)
            assert shards.hashes[name] == hash_bytes(bytes(raw_bytes(value)))
        entries = folder_tensors(folder)
        assert all(one.begin % 4 == 0 for one in entries.values() if one.dtype in ("F32", "U32"))
        index = json.loads((folder / INDEX).read_text())
        assert list(index["weight_map"]) == sorted(tensors)
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    one, other = (tmp_path / name / "model.safetensors" for name in ("bytes", "turned"))
    assert one.read_bytes() == other.read_bytes()
    header = one.read_bytes()[8 : 8 + int.from_bytes(one.read_bytes()[:8], "little")]
    assert json.loads(header)["__metadata__"] == {"format": "mlx"}
    with safetensors.safe_open(one, "np") as opened:  # the format's own reader
        assert set(opened.keys()) == set(tensors)
        assert opened.get_tensor("turned").tolist() == model.turned.tolist()


def test_unread_tensors_are_written_one_at_a_time(tmp_path: Path) -> None:
    def layers() -> nn.Module:
        model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(12)))
        model.update({"layers": [{"weight": mx.full((256, 256), i + 0.5)} for i in range(12)]})
        return model

    def write() -> None:
        tensors = tensors_of(layers())
        with open_shards(tmp_path, layers()) as shards:
            for name in list(tensors):
                shards.write(name, tensors.pop(name))

    _, peak = peak_of(write)
    assert peak <= 3 * 256 * 256 * 4
    values: Any = mx.load(str(tmp_path / "model.safetensors"))
    assert sorted(value[7, 7].item() for value in values.values()) == [i + 0.5 for i in range(12)]


def test_files_are_divided_as_mlx_lm_divides_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm import utils

    def small(weights: dict[str, mx.array]) -> list[dict[str, mx.array]]:
        return make_shards(weights, 0)  # a tensor is a file

    make_shards = utils.make_shards
    monkeypatch.setattr(utils, "make_shards", small)
    with open_shards(tmp_path, Odd()) as shards:
        for name, value in tensors_of(Odd()).items():
            shards.write(name, value)
    assert len(list(tmp_path.glob("model-0000?-of-00006.safetensors"))) == 6
    assert folder_tensors(tmp_path).keys() == tensors_of(Odd()).keys()


def test_a_tensor_that_was_forgotten_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not written"), open_shards(tmp_path, Odd()) as shards:
        shards.write("half", Odd().half)
