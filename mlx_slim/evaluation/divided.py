"""Models that are larger than a machine: which way to divide them, and opening a rank's part.

Invariant: a rank reads a tensor, keeps its part and forgets the rest before the next one: beside
its part (whole ÷ ranks, and the embedding and head, which every rank has) it holds one tensor. An
adapter is merged on the way. Try it:
``mlx.launch -n 2 --backend ring -- mlx-slim eval MODEL --parallel tensor --task piqa -o OUT``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_slim import runtime
from mlx_slim.adapters.stack import Weighted, used_folders
from mlx_slim.adapters.store import adapter_hash
from mlx_slim.adapters.unread import merge_unread
from mlx_slim.agreement import first, on_every_rank, rank_memory, refuse_differences
from mlx_slim.artifacts import hash_json, provenance
from mlx_slim.config.parallel import Parallel
from mlx_slim.errors import SlimError
from mlx_slim.hashing import hash_samples
from mlx_slim.models.build import build
from mlx_slim.models.load import Loaded, model_files, read_config, resolve
from mlx_slim.models.opening import constants, read_weights
from mlx_slim.models.parallel import Split, divide, divided_by, why_not
from mlx_slim.models.quantized import DENSE_FRACTION, densify, is_quantized
from mlx_slim.models.streamed import Unread
from mlx_slim.quantization.base import unread_base
from mlx_slim.reading import JsonObject, ModelConfig
from mlx_slim.runtime import leads, on_gpu, world

_RANKS = "start it with mlx.launch -n 2 --backend ring -- mlx-slim ..., or leave --parallel out"


def shared_memory() -> int:
    """Return the bytes that each rank can have; all ranks call it."""
    memory = runtime.device_memory()
    return memory if world().size() == 1 else rank_memory(memory)


def chosen_split(
    parallel: Parallel, config: ModelConfig, *, fits: bool, questions: bool
) -> Split | None:
    """Return how a model is divided over the ranks; None where each has all of it.

    Args:
        parallel: What the user asks for.
        config: Of the model.
        fits: Whether each rank can hold the whole model.
        questions: Whether there are many, which ranks with the whole model can divide.

    Raises:
        SlimError: If there is one rank, or the model cannot be divided so.
    """
    ranks = world().size()
    if ranks == 1:
        if parallel in ("tensor", "pipeline"):
            raise SlimError(
                f"--parallel {parallel} divides a model over ranks, here is one", _RANKS
            )
        return None
    if parallel == "data":
        if not questions:
            raise SlimError(
                "--parallel data gives each rank its questions, here is one prompt at a time",
                "take --parallel tensor or pipeline, or start one rank",
            )
        return None
    if parallel == "auto" and questions and fits:
        return None
    ways: tuple[Split, ...] = ("tensor", "pipeline") if parallel == "auto" else (parallel,)
    skeleton = build(config)
    refusals = [why_not(skeleton, how, ranks) for how in ways]
    for how, refusal in zip(ways, refusals, strict=True):
        if refusal is None:
            return how
    refusal = refusals[0]
    assert refusal is not None
    raise refusal


def answering_split(
    source: str | Path,
    revision: str | None,
    parallel: Parallel,
    kv_bits: int | None,
    draft_model: str | Path | None,
    stack: Sequence[Weighted] = (),
) -> Split | None:
    """Return how the ranks divide a model that answers prompts; None on one rank.

    Raises:
        SlimError: On one of the ranks, as ``chosen_split``; if they have other versions, another
            model, other adapters or options; for a draft, and a quantized cache in a pipeline.
    """

    def checked() -> Split | None:
        how = chosen_split(parallel, read_config(source, revision), fits=True, questions=False)
        if how is not None and draft_model is not None:
            raise SlimError(
                "--draft-model drafts on one rank only, here are several", "leave it out"
            )
        if how == "pipeline" and kv_bits is not None:
            raise SlimError(
                "--kv-bits is not there for a pipeline", "leave it out, or take --parallel tensor"
            )
        return how

    def compared() -> JsonObject:
        facts = provenance()
        adapters = [[adapter_hash(one.folder), one.weight] for one in stack]
        return {
            "python": facts["python"],
            **facts["versions"],
            "the model's files": hash_samples(model_files(resolve(source, revision))),
            "the adapters": hash_json(adapters) if adapters else "none",
            "--parallel": how,
            "--kv-bits": kv_bits,
        }

    how = on_every_rank(checked)
    if how is not None:
        refuse_differences(on_every_rank(compared))
    return how


def announce(model: Any, prompt: JsonObject | None) -> None:
    """Send a prompt to the other ranks of a divided ``model``, which ``follow``; None ends that."""
    if divided_by(model) is not None and leads():
        first(prompt, patient=True)


def rank_bytes(sizes: Mapping[str, int]) -> int:
    """Return the most bytes of a divided model that a rank holds.

    Args:
        sizes: Name -> bytes of each tensor; those outside the blocks are on every rank.
    """
    outside = sum(size for name, size in sizes.items() if not re.search(r"\.\d+\.", name))
    return outside + -(-(sum(sizes.values()) - outside) // world().size())


def load_divided(
    source: str | Path,
    how: Split,
    stack: Sequence[Weighted] = (),
    *,
    memory: int,
    dense: bool | None = None,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    trust_remote_code: bool = False,
) -> tuple[Loaded, bool]:
    """Load this rank's part of ``source``, with adapters merged in; all ranks call it.

    Args:
        source: Folder or hub id.
        how: By heads and neurons, or by blocks.
        stack: Adapters, whose sum is merged into the weights before they are divided.
        memory: Of each rank: decides whether quantized layers are dequantized on a CPU.
        dense: That decision, where it was made before.
        revision: Branch, tag or commit of a hub id.
        dtype: As ``load`` takes it.
        trust_remote_code: Run Python files that the repository brings.

    Returns:
        The model, and whether it was dequantized.

    Raises:
        SlimError: As ``load_base`` and ``merge_unread``, on one of the ranks; the others end too.
    """
    loaded, dense = on_every_rank(
        lambda: _opened(
            unread_base(
                source,
                used_folders(stack),
                revision=revision,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
            ),
            how,
            stack,
            memory,
            dense,
        )
    )
    loaded.model.eval()
    return loaded, dense


def _opened(
    unread: Unread, how: Split, stack: Sequence[Weighted], memory: int, dense: bool | None
) -> tuple[Loaded, bool]:
    """Return this rank's part, read, and whether it was dequantized; no other rank is needed."""
    model = unread.open()
    dense = _dense_pays(model, memory) if dense is None else dense

    def again() -> nn.Module:
        other = unread.open()
        if dense:
            densify(other, mx.float32, read=False)
        return other

    if dense:
        densify(model, mx.float32, read=False)
    if stack:
        merge_unread(model, stack, again)
    divide(model, how)
    read_weights(model, unread.source)
    mx.eval(constants(model))
    loaded = Loaded(
        model,
        unread.tokenizer,
        unread.config,
        unread.path,
        unread.source,
        unread.revision,
        unread.notes,
    )
    return loaded, dense


def _dense_pays(model: nn.Module, memory: int) -> bool:
    """Return whether this rank's part answers faster dense, as ``densify_pays`` of a whole one."""
    if on_gpu() or not is_quantized(model):
        return False
    from mlx_lm.utils import get_total_parameters

    return 4 * get_total_parameters(model) // world().size() < DENSE_FRACTION * memory
