"""The rotary embeddings of a config, put into the model that its mlx-lm class makes.

mlx-lm's classes leave out some of what a config can request (``attention_factor`` and ``truncate``
of yarn, the short factors of longrope), or ignore scaling altogether. Invariant: a model that is
built here rotates as transformers does, at every length, or it is refused; what its class already
does the same way (no scaling) is left alone. Try it: ``make parity``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import mlx.nn as nn

from mlx_slim.errors import SlimError
from mlx_slim.models import structure
from mlx_slim.models.reference import Reference
from mlx_slim.models.rope import TYPES, check_values, make_rope
from mlx_slim.models.rope_support import RopeSupport, support_of
from mlx_slim.reading import JsonObject, ModelConfig

_HINT = "loading it would give wrong logits; a newer mlx-lm may support it"
_NAME = re.compile(r"(RoPE|RotaryEmbedding)$")  # of the classes of rotary embeddings


def plain_config(config: ModelConfig) -> ModelConfig:
    """Return ``config`` without the scaling that ``install`` will put in.

    Some classes refuse or misread scaling that they do not know, at construction already.
    """
    config = copy.copy(config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = plain_config(config["text_config"])
    if kind_of(config.get("rope_scaling")) in TYPES:
        config["rope_scaling"] = None
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict):
        if kind_of(parameters) in TYPES:
            parameters = {**parameters, "type": "default", "rope_type": "default"}
        config["rope_parameters"] = {
            key: {**value, "type": "default", "rope_type": "default"}
            if kind_of(value) in TYPES
            else value
            for key, value in parameters.items()
        }
    return config


def differs_in_stock(rope: JsonObject, support: RopeSupport) -> bool:
    """Return whether mlx-lm's own class rotates otherwise than transformers does.

    Args:
        rope: ``rope_parameters`` of transformers, of a type in ``TYPES``.
        support: Of the class's module.
    """
    kind = rope["rope_type"]
    if not support.computes(kind):
        return True  # the class ignores scaling
    if kind == "longrope":
        return rope.get("short_factor") != rope.get("long_factor") or "attention_factor" in rope
    if kind != "yarn":
        return False
    scales = [rope.get(key) for key in ("mscale", "mscale_all_dim")]
    return (
        rope.get("attention_factor") is not None
        or not rope.get("truncate", True)
        or (any(scales) and not all(scales))
    )


def kind_of(rope: Any) -> str | None:
    """Return the RoPE type that a ``rope_scaling`` or ``rope_parameters`` names."""
    if not isinstance(rope, dict):
        return None
    kind = rope.get("rope_type") or rope.get("type")
    return "longrope" if kind == "su" else kind


def install(model: nn.Module, config: ModelConfig, reference: Reference) -> None:
    """Put the rotary embeddings of ``reference`` into a model that mlx-lm built, in place.

    Args:
        model: Dense; built from ``plain_config(config)``, unless its class reads scaling itself.
        config: Names the model type in an error.
        reference: Of ``config``.

    Raises:
        SlimError: If the config asks for scaling that can be put in nowhere.
    """
    scaled = {rope["rope_type"] for rope in reference.rope if rope} & set(TYPES)
    if not scaled and not reference.by_layer:
        return
    done = set()
    replacements: dict[tuple, nn.Module] = {}
    blocks = structure.blocks(model)
    for rope, block in zip(reference.rope, blocks, strict=False):
        for owner, name in list(_slots(block)) if rope else ():
            assert rope is not None
            old = owner[name]
            new = _replacement(rope, old, reference, replacements)
            if new is not None:
                owner[name] = new
            if new is not None or not _stock(old):
                done.add(rope["rope_type"])
    if missing := scaled - done:
        raise SlimError(
            f"RoPE type {min(missing)!r} is not supported by the mlx-lm class of "
            f"{config.get('model_type')!r}",
            _HINT,
        )


def _replacement(
    rope: JsonObject, old: nn.Module, reference: Reference, replacements: dict[tuple, nn.Module]
) -> nn.Module | None:
    """Return the replacement of ``old``; None where ``old`` computes ``rope``."""
    kind = rope["rope_type"]
    if not _stock(old):
        if kind in TYPES:
            _check_embedding(rope, old)
        return None
    dims = int(old.dims if hasattr(old, "dims") else old.dim)  # type: ignore[arg-type]
    traditional = bool(getattr(old, "traditional", False))
    key = (id(rope), dims, traditional)
    if key not in replacements:
        if kind in TYPES:
            replacements[key] = make_rope(
                rope, dims, positions=reference.positions, traditional=traditional
            )
        elif kind == "default" and reference.by_layer and rope.get("rope_theta"):
            replacements[key] = nn.RoPE(
                dims, traditional=traditional, base=float(rope["rope_theta"])
            )
        else:
            return None
    return replacements[key]


def _slots(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the rotary embeddings of a block: who holds them, and under which name."""
    for _, owner in block.named_modules():
        for name, child in owner.children().items():
            if isinstance(child, nn.Module) and _NAME.search(type(child).__name__):
                yield owner, name


def _stock(module: nn.Module) -> bool:
    """Return whether a rotary embedding is one of mlx-lm's shared ones."""
    from mlx_lm.models import rope_utils

    return isinstance(module, nn.RoPE) or type(module).__module__ == rope_utils.__name__


def _check_embedding(rope: JsonObject, module: nn.Module) -> None:
    """Refuse what the rotary embedding that only this model class has does not compute.

    Raises:
        SlimError: Names it.
    """
    check_values(rope)
    kind, where = rope["rope_type"], type(module).__module__
    if not where.startswith("mlx_lm.models."):
        return  # the model's own code
    if kind not in support_of(where).embedding_types:
        raise SlimError(f"RoPE type {kind!r} is unknown to {where}", _HINT)
    for key, default in (("attention_factor", None), ("truncate", True)):
        value = rope.get(key, default)
        if value != default:
            text = f"config.json: {key}={value} of RoPE type {kind!r} is not read by {where}"
            raise SlimError(text, _HINT)
