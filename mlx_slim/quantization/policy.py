"""Which layer gets which bits, and why the others get none.

Invariant: every module that holds parameters is either quantized with known parameters or listed
with a reason; mlx-lm leaves layers out without a word. Try it:
``mlx-slim quantize MODEL -o DIR --group-size 128``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import mlx.nn as nn
from mlx.utils import tree_flatten
from pydantic import ValidationError

from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.models.quantizable import has_quantized_form
from mlx_slim.models.quantized import LayerFormat
from mlx_slim.models.structure import blocks_path
from mlx_slim.reading import JsonObject

MixedRecipe = Literal["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"]
RECIPES: tuple[str, ...] = get_args(MixedRecipe)

# What a model's own policy answers for a layer: arguments of ``mx.quantize``, or whether at all.
Decision = bool | JsonObject


_DEFAULTS = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def quantize_config(
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    *,
    sized: bool = False,
) -> QuantizeConfig:
    """Return a checked config; what is None takes the default of ``mode``.

    Args:
        bits: Of every layer.
        group_size: Weights that share a scale.
        mode: ``affine``, ``mxfp4``, ``mxfp8`` or ``nvfp4``.
        sized: A size is set, from which the bits of each layer follow.

    Raises:
        SlimError: If the mode is unknown or does not have these bits and this group size, or
            ``bits`` are set beside a size.
    """
    if sized and bits is not None:
        raise SlimError(
            f"bits={bits} and a size exclude each other: the bits of each layer follow from it",
            "leave out --bits, or --target-bytes and --bits-per-weight",
        )
    if mode not in _DEFAULTS:
        raise SlimError(f"unknown mode {mode!r}", did_you_mean(mode, _DEFAULTS))
    default_bits, default_group = _DEFAULTS[mode]
    values = {
        "bits": default_bits if bits is None else bits,
        "group_size": default_group if group_size is None else group_size,
        "mode": mode,
    }
    try:
        return QuantizeConfig.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))}={values[str(problem['loc'][0])]}: "
            f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
            if problem["loc"]
            else problem["msg"].removeprefix("Value error, ")
            for problem in error.errors()
        ]
        raise SlimError(
            "; ".join(problems),
            "affine has 2, 3, 4, 5, 6 or 8 bits and groups of 32, 64 or 128; "
            "mxfp4, mxfp8 and nvfp4 have one setting each: leave --bits and --group-size out",
        ) from error


@dataclass(frozen=True)
class Skipped:
    """A layer left as it is.

    Attributes:
        path: Dotted path inside the model.
        reason: Why, in words.
        parameters: Numbers that it holds.
    """

    path: str
    reason: str
    parameters: int


@dataclass(frozen=True)
class Policy:
    """The decision for every layer of one model.

    Attributes:
        chosen: Path -> format of each layer to quantize.
        skipped: The layers left as they are.
    """

    chosen: dict[str, LayerFormat]
    skipped: list[Skipped]


def make_policy(
    model: nn.Module,
    config: QuantizeConfig,
    recipe: str | None = None,
    formats: Mapping[str, LayerFormat | None] | None = None,
) -> Policy:
    """Decide for every layer of ``model``.

    Args:
        model: A dense model.
        config: Bits, group size and mode of a layer that the mixed-precision recipe does not name.
        recipe: One of ``RECIPES`` (mlx-lm's mixed precision, affine only), or None.
        formats: Layer -> its format, None for full precision, of layers that are decided already
            (``budget.LayerSizes.choose``).

    Raises:
        SlimError: If the recipe is unknown or does not fit the model, or no layer fits.
    """
    formats = formats or {}
    decide = _decider(model, config, recipe)
    base = LayerFormat(config.group_size, config.bits, config.mode)
    chosen: dict[str, LayerFormat] = {}
    skipped: list[Skipped] = []
    for path, module in leaves(model):
        parameters = count(module)
        if not parameters:
            continue
        reason = skip_reason(module, config.group_size)
        if not reason and path in formats:
            if (decided := formats[path]) is not None:
                chosen[path] = decided
                continue
            reason = "the size allows full precision"
        elif not reason:
            decision = decide(path, module)
            if decision:
                layer = LayerFormat(**decision) if isinstance(decision, dict) else base
                reason = skip_reason(module, layer.group_size)
                if not reason:
                    chosen[path] = layer
                    continue
            else:
                reason = "the model's own policy keeps it in full precision"
        skipped.append(Skipped(path, reason, parameters))
    if not chosen:
        widths = sorted({m["weight"].shape[-1] for _, m in leaves(model) if has_quantized_form(m)})
        raise SlimError(
            f"no layer can be quantized with group_size={config.group_size}: "
            f"the input widths are {', '.join(map(str, widths)) or 'none'}",
            "choose a group size that divides them",
        )
    return Policy(chosen, skipped)


def embed_formats(
    model: nn.Module, config: QuantizeConfig, bits: int | None
) -> dict[str, LayerFormat | None]:
    """Return layer -> format of what is outside the blocks, embedding and head, in ``bits``.

    Empty where ``bits`` is None; a layer that the model's own policy decides is left to it.
    """
    if bits is None:
        return {}
    inside, decide = blocks_path(model) + ".", _decider(model, config, None)
    return {
        path: LayerFormat(config.group_size, bits, config.mode)
        for path, module in leaves(model)
        if not path.startswith(inside)
        and not skip_reason(module, config.group_size)
        and decide(path, module) is True
    }


def count(module: nn.Module) -> int:
    """Return the numbers that a dense ``module`` holds."""
    return sum(value.size for _, value in tree_flatten(module.parameters()))  # pyright: ignore


def leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (path, module) of every module without children, in the order of the model."""
    return tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)  # pyright: ignore


def skip_reason(module: nn.Module, group_size: int) -> str:
    """Return why ``module`` cannot be quantized with ``group_size``, or an empty string."""
    if not has_quantized_form(module):
        kind = type(module).__name__
        is_norm = "norm" in kind.lower()
        return f"a norm ({kind})" if is_norm else f"{kind} has no quantized form"
    width = module["weight"].shape[-1]
    if width % group_size:
        return f"input width {width} is not divisible by group_size={group_size}"
    return ""


def _decider(
    model: nn.Module, config: QuantizeConfig, recipe: str | None
) -> Callable[[str, nn.Module], Decision]:
    if recipe is None:
        predicate: Callable[[str, nn.Module], Decision] | None = getattr(
            model, "quant_predicate", None
        )
        return predicate or (lambda path, module: True)
    if recipe not in RECIPES:
        raise SlimError(f"unknown recipe {recipe!r}", did_you_mean(recipe, RECIPES))
    if config.mode != "affine":
        raise SlimError(
            f"recipe {recipe} needs mode affine, not {config.mode}", "drop --mode or the recipe"
        )
    from mlx_lm.convert import mixed_quant_predicate_builder

    try:
        return mixed_quant_predicate_builder(recipe, model, config.group_size)  # pyright: ignore
    except ValueError as error:
        raise SlimError(
            f"recipe {recipe} does not fit {type(model).__module__.rsplit('.', 1)[-1]}: "
            "it looks for layers named down_proj",
            "use --bits without a recipe, or --method dynamic",
        ) from error
