"""Teachers: their adapters, and the hash of what decides their logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_slim.config.distill import TeacherConfig
from mlx_slim.distillation.teachers import fingerprint, load_teacher, name_of
from mlx_slim.errors import SlimError
from tests.support.adapters import write_adapter


def test_a_teacher_has_its_adapter_which_its_hash_includes(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    base = str(tiny("llama"))
    adapter = write_adapter(tmp_path / "adapter", tiny("llama"))
    plain, dressed = (
        TeacherConfig(model=base),
        TeacherConfig(model=base, adapter=str(adapter), name="dressed"),
    )
    prints = [fingerprint(teacher, mx.float32) for teacher in (plain, dressed)]
    assert prints[0] != prints[1]
    assert fingerprint(plain, mx.bfloat16) != prints[0]
    other = TeacherConfig(model=str(tiny("mistral")))
    assert fingerprint(other, mx.float32) != prints[0]
    tokens = mx.array([[1, 2, 3]])
    logits = [load_teacher(teacher, mx.float32)(tokens) for teacher in (plain, dressed)]
    assert not mx.allclose(*logits)
    assert (name_of(plain), name_of(dressed)) == ("llama", "dressed")


def test_a_teacher_that_is_not_there_is_named() -> None:
    with pytest.raises(SlimError, match="nowhere"):
        fingerprint(TeacherConfig(model="./nowhere"), mx.float32)
