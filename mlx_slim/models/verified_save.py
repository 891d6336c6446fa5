"""Save a model so that its folder appears only if it reads back as what was measured.

Invariant: every tensor read back is the one that was written, byte for byte, and the logits that
the folder gives on a few tokens are those of the model; else nothing is left. An unread model is
written a block at a time, and every folder is read back that way: beside a model in memory there is
one block. Models compute in float32 on a CPU and are stored in the dtype that they came in. Try it:
``mlx-slim quantize MODEL -o DIR``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_slim.artifacts import atomic_folder
from mlx_slim.errors import SlimError
from mlx_slim.hashing import hash_bytes
from mlx_slim.models import structure
from mlx_slim.models.finite import check_finite
from mlx_slim.models.lineage import carry
from mlx_slim.models.load import Loaded
from mlx_slim.models.logits_close import Change, logits_close
from mlx_slim.models.opening import cast, open_weights, read_weights
from mlx_slim.models.save import new_folder, save_model
from mlx_slim.models.shards import raw_bytes
from mlx_slim.models.streamed import (
    Logits,
    Unread,
    Walk,
    outside_blocks,
    rounded,
    tensors_of,
    unread,
)
from mlx_slim.models.tensors import FLOATS, Tensor, common_dtype
from mlx_slim.reading import ModelConfig, short
from mlx_slim.runtime import DTYPES, on_gpu

_PROBE = 16  # tokens on which the saved model is compared


def compute_dtype() -> mx.Dtype | None:
    """Return float32 on a CPU, where only that is fast; None is the stored dtype."""
    return None if on_gpu() else mx.float32


def stored_dtype(tensors: dict[str, Tensor]) -> mx.Dtype:
    """Return the dtype that most floating bytes of the source are stored in."""
    return DTYPES[FLOATS[common_dtype(tensors)]]


def save_checked(
    out: Path,
    loaded: Loaded | Unread,
    config: ModelConfig,
    stored: mx.Dtype,
    beside: Callable[[Path], None] | None = None,
    adapters: Sequence[Path] = (),
    *,
    judged_NT: mx.array | None = None,
    judge: Callable[[Logits], None] | None = None,
) -> None:
    """Save a model in ``stored``, read it back, compare, and let the folder appear.

    Args:
        out: Must not exist.
        loaded: The model, with its tokenizer and source; one in memory is rounded to ``stored``.
        config: Of the model as it is now.
        stored: Dtype of the floating weights on disk.
        beside: Writes what else belongs into the folder.
        adapters: What was folded into the model.
        judged_NT: Rows that an unread model reads while it is written.
        judge: Is given its logits (1, T, V) as a function of one of these rows (1, T); what it
            raises leaves no folder.

    Raises:
        ResourceError: If the disk is too small.
        SlimError: If what is read back differs; nothing is left behind.
    """
    rows = [mx.arange(_PROBE)[None]]
    rows += [row_T[None] for row_T in (() if judged_NT is None else judged_NT)]
    with atomic_folder(out) as temporary:
        folder = temporary / "model"
        write = _write if isinstance(loaded, Loaded) else _write_unread
        hashes, logits = write(folder, loaded, config, stored, rows)  # pyright: ignore
        expected = logits(rows[0])
        mx.eval(expected)
        if judge is not None:
            judge(logits)
        del logits
        _same(out, folder, hashes, expected)
        for file in list(folder.iterdir()):
            file.rename(temporary / file.name)
        folder.rmdir()
        carry(temporary, [loaded.path, *adapters])
        if beside is not None:
            beside(temporary)


def _write(
    folder: Path, loaded: Loaded, config: ModelConfig, stored: mx.Dtype, rows: list[mx.array]
) -> tuple[dict[str, str], Logits]:
    """Write a model in memory; return the hashes of its tensors, and its logits on ``rows``."""
    cast(loaded.model, stored)
    read_weights(loaded.model)
    hashes = save_model(folder, loaded.model, loaded.tokenizer, config, code_from=loaded.path)
    if (compute := compute_dtype()) is not None:
        cast(loaded.model, compute)
        read_weights(loaded.model)
    return hashes, Walk(loaded.model, rows).to_the_end("comparing")


def _write_unread(
    folder: Path, source: Unread, config: ModelConfig, stored: mx.Dtype, rows: list[mx.array]
) -> tuple[dict[str, str], Logits]:
    """Write a model while it is read, as ``_write``."""
    shapes = rounded(source.open, stored)()
    weights = rounded(source.open, stored, compute_dtype())
    with new_folder(folder, shapes, source.tokenizer, config, code_from=source.path) as shards:

        def write(tensors: dict[str, mx.array]) -> None:
            for name in list(tensors):
                check_finite([(name, tensors[name])], "the weights")
                shards.write(name, tensors.pop(name))

        write(outside_blocks(shapes, tensors_of(weights)))
        walk = Walk(weights, rows)
        prefix = structure.blocks_path(shapes)
        for index, block in walk.blocks("writing blocks"):
            tensors: list[tuple[str, mx.array]] = tree_flatten(block.parameters())  # type: ignore[assignment]
            write({f"{prefix}.{index}.{path}": value for path, value in tensors})
            del tensors
            for _ in walk.passed(index):
                pass
    return shards.hashes, walk.answers()


def differing_tensors(folder: Path, hashes: dict[str, str]) -> set[str]:
    """Return the tensors of a model folder that are not those of ``hashes``, read one at a time.

    Raises:
        SlimError: If names or shapes are not those of its config.
    """
    tensors = tensors_of(lambda: open_weights(folder)[0])
    differing = hashes.keys() ^ tensors.keys()
    for name in sorted(hashes.keys() & tensors.keys()):
        if hash_bytes(raw_bytes(tensors.pop(name))) != hashes[name]:  # pyright: ignore
            differing.add(name)
    return set(differing)


def _same(out: Path, folder: Path, hashes: dict[str, str], expected: mx.array) -> None:
    """Raise unless ``folder`` holds what was written, and computes ``expected`` of the probe."""
    differing = differing_tensors(folder, hashes)
    weights = unread(folder, dtype=compute_dtype()).open
    probe_1T = mx.arange(_PROBE)[None]
    logits = Walk(weights, [probe_1T], short(folder)).to_the_end("reading back")(probe_1T)
    difference = logits_close(logits, expected, Change.NOTHING)
    if differing or not difference.close:
        raise SlimError(
            f"{out}: the saved model is not the one that was measured: {difference}, "
            f"{len(differing)} tensors differ {sorted(differing)[:3]}; it was removed",
            "the disk may be failing; else please report it",
        )
