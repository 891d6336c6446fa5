"""The plan of a pruning: what shapes and options determine, all of it checked.

Invariant: nothing is written and no weight is read; all problems of the options are reported at
once.
Try it: ``mlx-slim prune MODEL -o DIR --ratio 0.2 --dry-run``.
"""

from __future__ import annotations

import re
from typing import Any

from mlx_slim.errors import SlimError
from mlx_slim.models.build import WIDTHS, build
from mlx_slim.models.kinds import EXPERTS, HEADS, HIDDEN, MLP
from mlx_slim.models.mixtures import Mixture, mixture_of
from mlx_slim.pruning.counts import Counts, count
from mlx_slim.pruning.families import families_of
from mlx_slim.pruning.methods import SIZE_FLAGS
from mlx_slim.pruning.options import (
    NAMED,
    PruneOptions,
    check_experts,
    conflicts,
    method_of,
    one_error,
    rows_of,
)
from mlx_slim.pruning.planned import Plan
from mlx_slim.pruning.records import GROUPS
from mlx_slim.pruning.surgery import (
    check_supported,
    config_with_sizes,
    config_without_layers,
    global_every,
    limits_of,
    text_part,
)
from mlx_slim.pruning.width import (
    ANY,
    MULTIPLE,
    WidthLimits,
    sizes_for,
    sizes_named,
    sizes_of_experts,
    sizes_within,
)
from mlx_slim.reading import ModelConfig
from mlx_slim.runtime import DTYPES
from mlx_slim.units import human_bytes

_PROTECT = (4, 2, 32)  # first and last layers of how many (arXiv 2305.11627)


def plan(config: ModelConfig, options: PruneOptions, itemsize: int) -> Plan:
    """Return the plan for the model of ``config``.

    Args:
        config: Normalised.
        options: The user's.
        itemsize: Bytes of a stored weight, for ``target_bytes``.

    Raises:
        SlimError: All problems of the options, or an unsupported model.
    """
    axis, method = method_of(options)
    problems = conflicts(options, axis, method)
    if problems:
        raise one_error(problems)
    mixture = mixture_of(config)
    check_experts(options, axis, method, mixture=mixture is not None)
    if mixture is None:
        check_supported(config)
    if "quantization" in config:
        raise SlimError(
            "the model is quantized, and quantized weights cannot be pruned",
            "dequantize it first: mlx-slim convert MODEL -o DIR --dequantize",
        )
    model = build(config)
    counts = count(model, mixture)
    total = len(counts.blocks)
    if options.layers is not None:
        removed = parse_layers(options.layers, total)
        config_without_layers(config, removed)
        stays = counts.without_layers(removed)
        return Plan(axis, NAMED, removed, removed, len(removed), (), {}, counts, stays, (0, 0), [])
    target = _target(options, counts, itemsize)
    if mixture is not None:
        return _experts(options, method, mixture, counts, target)
    first, last = _protection(options, total)
    free = list(range(first, total - last))
    notes: list[str] = []
    if axis == "width" and options.uniform:
        free = list(range(total))
        if not options.prunes_channels and not options.named_sizes:
            notes.append(
                "all layers get the same widths, so none is protected (--no-uniform protects the "
                "first and last; only mlx-slim reads such models)"
            )
    if not free:
        raise SlimError(
            f"all {total} layers are protected: {first} first and {last} last",
            "set a smaller --protect-first or --protect-last",
        )
    if axis == "depth":
        if every := global_every(config):
            raise SlimError(
                f"every {every}th layer of a gemma3 has full attention, by its number: no method "
                "may choose the layers",
                f"name {every} in a row, or a multiple: --layers 0-{every - 1}",
            )
        return _depth(options, method, free, counts, target, notes)
    return _width(config, options, method, model, free, counts, target, notes)


def _target(options: PruneOptions, counts: Counts, itemsize: int) -> int | None:
    """Return the most parameters that may remain; None without a target."""
    target = options.target_params
    if options.target_bytes is not None:
        target = options.target_bytes // itemsize
    if target is not None and target >= counts.total:
        size = f"{target:,} parameters"
        if options.target_bytes is not None:
            size = f"{human_bytes(options.target_bytes)} ({size})"
        raise SlimError(
            f"the model has {counts.total:,} parameters already, the target is {size}",
            "set a smaller target",
        )
    return target


def _experts(
    options: PruneOptions, method: str, mixture: Mixture, counts: Counts, target: int | None
) -> Plan:
    sizes = sizes_of_experts(
        mixture, counts, ratio=options.ratio, target=target, named=options.experts
    )
    if sizes[EXPERTS] == counts.sizes[EXPERTS]:
        sized = f"--ratio {options.ratio:g}" if options.ratio else f"--experts {options.experts}"
        raise SlimError(
            f"{sized} removes none of {mixture.count} experts: a token is sent to "
            f"{mixture.per_token}, and {len(mixture.sizes) - 1} smaller numbers are possible",
            "set a larger --ratio or fewer --experts",
        )
    layers = [layer for layer, family in enumerate(mixture.families) if family]
    notes = []
    if len(layers) < len(mixture.families):
        notes.append(f"{len(mixture.families) - len(layers)} layers have no experts: unchanged")
    if mixture.groups > 1:
        notes.append(f"the router ranks {mixture.groups} groups of experts: each loses as many")
    stays, rows = counts.with_sizes(sizes), rows_of(options, method)
    return Plan("width", method, layers, [], 0, (EXPERTS,), sizes, counts, stays, rows, notes)


def planned_config(config: ModelConfig, options: PruneOptions) -> ModelConfig:
    """Return the configuration of the pruned model, as far as shapes determine it.

    The layers to remove are chosen by measuring; the last ones are taken in their place.

    Raises:
        SlimError: As ``plan``.
    """
    planned = plan(config, options, weight_size(config))
    if planned.axis == "width":
        return config_with_sizes(config, planned.sizes, uniform=options.uniform)
    total = text_part(config)["num_hidden_layers"]
    return config_without_layers(config, planned.removed or range(total - planned.count, total))


def weight_size(config: ModelConfig) -> int:
    """Return the bytes of a stored weight by the config's dtype; 2 without one."""
    name = str(config.get("dtype") or config.get("torch_dtype"))
    return DTYPES.get(name, DTYPES["bfloat16"]).size


def parse_layers(text: str, total: int) -> list[int]:
    """Return the numbers of ``21-29,31``, ascending.

    Raises:
        SlimError: If it is not such a list, out of range, or leaves no layer.
    """
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise SlimError(
                f"--layers {text!r} is not a list of layers", "write it as 21-29 or 3,5,7-9"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= total:
            raise SlimError(
                f"there is no layer {last}: the model has layers 0 to {total - 1}",
                "layers are counted from 0",
            )
        layers |= set(range(first, last + 1))
    if len(layers) == total:
        raise SlimError(f"--layers {text} removes all {total} layers", "leave at least one")
    return sorted(layers)


def _protection(options: PruneOptions, total: int) -> tuple[int, int]:
    first, last, of = _PROTECT
    pairs = ((options.protect_first, first), (options.protect_last, last))
    counts = [
        min(usual, round(usual * total / of)) if option is None else option
        for option, usual in pairs
    ]
    return max(0, counts[0]), max(0, counts[1])


def _depth(
    options: PruneOptions,
    method: str,
    free: list[int],
    counts: Counts,
    target: int | None,
    notes: list[str],
) -> Plan:
    total = len(counts.blocks)
    if options.ratio is not None:
        number = round(options.ratio * total)
        if not number:
            raise SlimError(
                f"--ratio {options.ratio:g} of {total} layers is less than one layer",
                f"set at least {0.5 / total + 1e-4:.2g}",
            )
    else:
        assert target is not None
        # Blocks may differ in size; the method may choose the lightest.
        lightest = sorted(counts.blocks[i] for i in free)
        number = next(
            (n for n in range(1, len(free)) if counts.total - sum(lightest[:n]) <= target), 0
        )
        if not number:
            least = counts.total - sum(lightest[: len(free) - 1])
            raise SlimError(
                f"{target:,} parameters cannot be reached by removing layers: with "
                f"{len(free) - 1} fewer there are still {least:,}",
                "prune widths too (--axis width), or protect fewer layers",
            )
    if number > len(free) or number >= total:
        raise SlimError(
            f"{number} layers cannot be removed: {len(free)} of {total} are not protected, and one "
            "must remain",
            "set a smaller --ratio, or protect fewer with --protect-first and --protect-last",
        )
    protected = total - len(free)
    if protected:
        notes.append(
            f"{protected} layers are protected: {free[0]} first, {total - 1 - free[-1]} last"
        )
    stays = counts.total - number * counts.blocks[free[0]]
    rows = rows_of(options, method)
    return Plan("depth", method, free, [], number, (), {}, counts, stays, rows, notes)


def _width(
    config: ModelConfig,
    options: PruneOptions,
    method: str,
    model: Any,
    free: list[int],
    counts: Counts,
    target: int | None,
    notes: list[str],
) -> Plan:
    kind = config.get("model_type")
    if options.uniform and config.get(WIDTHS) is not None:
        raise SlimError(
            "this model's widths differ per layer already", "prune it further with --no-uniform"
        )
    limits = limits_of(config, hidden=options.prunes_channels) if options.uniform else ANY
    families = families_of(model)
    if options.named_sizes:
        sizes = sizes_named(families, options.named_sizes, limits)
        kinds = tuple(sizes)
    else:
        kinds = _kinds(config, options, limits, notes)
        if options.ratio is not None:
            sizes = sizes_for(families, options.ratio, kinds, free, limits)
        else:
            assert target is not None
            sizes = sizes_within(families, target, kinds, free, counts, limits)
    still = [k for k in kinds if sizes[k] == counts.sizes[k]]
    if len(still) == len(kinds):
        flags = ", ".join(SIZE_FLAGS[k] for k in options.named_sizes)
        raise SlimError(
            f"{flags or f'--ratio {options.ratio:g}'} removes nothing: MLP and residual stream "
            "change in steps of 64, heads in whole groups",
            "set a smaller size" if flags else "set a larger ratio",
        )
    if options.ratio is not None:
        notes += [_unchanged(k, options.ratio, config, limits) for k in still]
    if HIDDEN in kinds:
        notes.append("the norms are rescaled: they divide by the number of channels")
    if not options.uniform:
        notes.append(
            "widths differ per layer: only mlx-slim reads the result, stock mlx-lm does not"
        )
    new = config_with_sizes(config, sizes, uniform=options.uniform)
    if new["model_type"] != kind:
        notes.append(
            f"config.json says {new['model_type']}, which computes the same: transformers refuses "
            f"a {kind} whose {text_part(new)['num_attention_heads']} heads do not divide its width"
        )
    stays = counts.with_sizes(sizes)
    rows = rows_of(options, method)
    return Plan("width", method, free, [], 0, kinds, sizes, counts, stays, rows, notes)


def _kinds(
    config: ModelConfig, options: PruneOptions, limits: WidthLimits, notes: list[str]
) -> tuple[str, ...]:
    """Return the kinds of groups to prune by a ratio or target; what is left out is noted."""
    kind, hidden = config.get("model_type"), options.hidden
    heads = options.heads is not False
    if limits.head_dim_is_derived and hidden and not heads:
        raise SlimError(
            f"mlx-lm derives the head size of {kind} from hidden_size and heads: the residual "
            "stream is pruned with whole heads or not at all",
            "leave out --no-heads",
        )
    if limits.head_dim_is_derived and heads and not hidden:
        if options.heads:
            raise SlimError(
                f"mlx-lm derives the head size of {kind} from its number of heads: fewer heads "
                "cannot be written to a config with --uniform",
                "leave out --heads, add --hidden (the residual stream shrinks too), or set "
                "--no-uniform (only mlx-slim reads such models)",
            )
        heads = False
        notes.append(
            f"heads are not pruned: mlx-lm derives the head size of {kind} from their number "
            "(--hidden prunes them with the residual stream; --no-uniform too, but only mlx-slim "
            "reads such models)"
        )
    chosen = {HEADS: heads, MLP: options.mlp is not False, HIDDEN: hidden}
    if kinds := tuple(name for name, prunes in chosen.items() if prunes):
        return kinds
    raise SlimError(
        f"--uniform cannot prune heads of {kind}, and --no-mlp leaves nothing to prune",
        "leave out --no-mlp",
    )


def _unchanged(kind: str, ratio: float, config: ModelConfig, limits: WidthLimits) -> str:
    """Return the note that ``ratio`` is too small to prune ``kind``."""
    step = f"{MULTIPLE} of them" if kind != HEADS else "the next number of KV groups"
    if kind == HEADS and limits.heads_divide_hidden:
        step += f" whose heads divide hidden_size={text_part(config)['hidden_size']}"
    return f"{GROUPS[kind]} are not pruned: a ratio of {ratio:g} does not reach {step}"
