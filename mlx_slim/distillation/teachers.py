"""Teachers: loading, and a hash of what decides their logits.

Invariant: two teachers with equal fingerprints give the same logits. Try it:
``mlx-slim distill distill-smollm2 --dry-run``.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.adapters.store import load_adapter
from mlx_slim.artifacts import hash_files, public_name
from mlx_slim.config.distill import TeacherConfig
from mlx_slim.errors import SlimError
from mlx_slim.models.load import load, resolve
from mlx_slim.models.quantized import densify, densify_pays
from mlx_slim.models.tensors import WEIGHTS
from mlx_slim.reading import JsonObject
from mlx_slim.runtime import dtype_name


def name_of(teacher: TeacherConfig) -> str:
    """Return the name of a teacher in reports."""
    return teacher.name or public_name(teacher.model or "teacher")


def fingerprint(teacher: TeacherConfig, dtype: mx.Dtype) -> JsonObject:
    """Return what decides a teacher's logits: hashes of its files, and the dtype.

    Raises:
        SlimError: If the model is not there.
    """
    folder = resolve(_source(teacher), teacher.revision)
    adapter = None
    if teacher.adapter is not None:
        adapter = hash_files(Path(teacher.adapter).glob("adapter*"))
    weights = hash_files([*folder.glob(WEIGHTS), folder / "config.json"])
    return {"weights": weights, "adapter": adapter, "dtype": dtype_name(dtype)}


def load_teacher(teacher: TeacherConfig, dtype: mx.Dtype) -> nn.Module:
    """Return the teacher with its adapter, in evaluation mode.

    Raises:
        SlimError: If it cannot be loaded.
    """
    model = load(_source(teacher), revision=teacher.revision, dtype=dtype).model
    if teacher.adapter is not None:
        load_adapter(model, teacher.adapter)
    if densify_pays(model):
        densify(model)
    model.eval()
    mx.eval(model.parameters())
    return model


def _source(teacher: TeacherConfig) -> str:
    if teacher.model is None:
        raise SlimError("a teacher has no model", "set distill.teachers=[{model: …}]")
    return teacher.model
