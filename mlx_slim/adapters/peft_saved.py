"""Modules that PEFT trained in full beside an adapter (``modules_to_save``), as PEFT reads them.

Invariant: a module counts as PEFT counts it: its path ends in one of the names, with a dot before
it or not, so that ``norm`` means ``input_layernorm`` too. Where the head is the embedding, PEFT
leaves the head at the base's matrix unless ``ensure_weight_tying`` is set; then it stores the one
matrix under both names. What this package cannot compute is refused. Try it:
``mlx-slim import peft -o adapters``.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.adapters.saved import candidates, saved_shapes, saved_table
from mlx_slim.errors import SlimError
from mlx_slim.models.tensors import few
from mlx_slim.reading import JsonObject

TIED_HEAD = "lm_head"  # of transformers, where this package has one module for head and embedding
_MERGE = "merge it with PEFT (merge_and_unload) and convert that"

Arrays = dict[str, mx.array]


def saved_of(
    folder: Path, stored: Arrays, model: nn.Module, settings: JsonObject, *, tied: bool
) -> tuple[Arrays, Arrays]:
    """Return the tensors of the modules that were trained in full, and the rest of ``stored``.

    Args:
        folder: For messages.
        stored: ``PATH.weight`` and the like: what the file holds besides factors.
        model: The base, without adapters.
        settings: ``adapter_config.json``.
        tied: Whether its head is the embedding.

    Raises:
        SlimError: If a module is missing, is of another shape, or is tied and only one of its two
            places was trained.
    """
    names = tuple(settings.get("modules_to_save") or ())
    if not names:
        return {}, stored
    everything = candidates(model)
    chosen = [path for path in everything if path.endswith(names)]
    table = saved_table(chosen)
    head = stored.get(f"{TIED_HEAD}.weight") if tied else None
    rest = {name: value for name, value in stored.items() if head is None or value is not head}
    if tied and (table is not None or head is not None):
        there = stored.get(f"{table}.weight")
        if head is None or there is None or not bool(mx.array_equal(head, there).item()):
            raise SlimError(
                f"{folder} trains one of embedding and head in full, and the base has one matrix "
                "for both",
                "train it with ensure_weight_tying=True in PEFT, or over a base with a head of its "
                "own",
            )
    expected = saved_shapes(model, chosen)
    wrong = [n for n, shape in expected.items() if n not in rest or rest[n].shape != shape]
    if wrong or not chosen:
        what = f"{few(wrong)}, or not in the shape of the base" if wrong else "any of them"
        raise SlimError(f"{folder}: modules_to_save is {list(names)}, without {what}", _MERGE)
    saved = {name: rest[name] for name in expected}
    return saved, {name: value for name, value in rest.items() if name not in expected}
