"""Which smaller models are worth measuring: bits, layers, heads and neurons, and mixtures.

Invariant: every candidate meets the budget by its counted bytes, and none is listed that another
beats in every respect: of the same cut, only the most bits that fit. The counts are those of the
model that is made. Try it:
``mlx-slim slim MODEL -o DIR --disk 200MB --task arc_easy --dry-run``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import mlx.core as mx

from mlx_slim.errors import SlimError
from mlx_slim.pruning.plan import plan
from mlx_slim.pruning.surgery import config_with_sizes, config_without_layers
from mlx_slim.reading import ModelConfig
from mlx_slim.slimming.candidate import Candidate, Cost, Cut, format_of
from mlx_slim.slimming.cost import cost
from mlx_slim.slimming.options import SlimOptions
from mlx_slim.units import human_bytes

BITS = (8, 6, 5, 4, 3, 2)
FLOOR = 0.4  # of the parameters: below it nothing recovers in the time that this takes
STEPS = 64  # widths between all and none
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
LEVELS = 3  # formats with more bits than fit whole, that are cut until they fit
# Sizes, as fractions of the original's folder, that a search without a budget goes down.
LADDER = (0.8, 0.65, 0.55, 0.45, 0.36, 0.3, 0.25, 0.2, 0.15)


def mixed_weight_bytes(bits_per_weight: float, parameters: int) -> int:
    """Return the most bytes of weights that so many bits a weight, in whole hundredths, allow."""
    return math.floor(round(100 * bits_per_weight) * parameters / 800)


def cut_config(config: ModelConfig, cut: Cut, size: int) -> ModelConfig:
    """Return the config of the model of ``config`` after ``cut``.

    Args:
        config: Of a dense model.
        cut: Its layers are counted; which of them go is measured later.
        size: Bytes of a stored number.

    Raises:
        SlimError: If the model cannot be cut so.
    """
    text = {**config, **(config.get("text_config") or {})}
    options = cut.options(text["num_hidden_layers"], None, None)
    planned = plan(config, options, size)
    if cut.axis == "depth":
        return config_without_layers(config, planned.layers[-planned.count :])
    return config_with_sizes(config, planned.sizes, uniform=True)


class SearchSpace:
    """The smaller models of one original.

    Args:
        config: Of the original.
        dtype: That its weights are stored in.
        options: Context and cache of ``memory``.
        others: Bytes of the folder's other files.
    """

    def __init__(
        self, config: ModelConfig, dtype: mx.Dtype, options: SlimOptions, others: int
    ) -> None:
        self._config, self.dtype = config, dtype
        self._cost = partial(
            cost, dtype=dtype, context=options.context, kv_bits=options.kv_bits, others=others
        )
        self.candidate = lru_cache(maxsize=None)(self._candidate)
        self.original = self.candidate(None, ())
        self.shortens = self._can(Cut("depth", layers=1))
        target = round(0.8 * self.original.cost.parameters)
        axes = ("experts",) if self.original.experts else ("width", "hidden")
        self.axes = [axis for axis in axes if self._can(Cut(axis, target=target))]

    def config_of(self, cuts: tuple[Cut, ...]) -> ModelConfig:
        """Return the config of the dense model after all cuts; which layers go is not known yet.

        Raises:
            SlimError: If the model cannot be cut so.
        """
        config = self._config
        for cut in cuts:
            config = cut_config(config, cut, self.dtype.size)
        return config

    def _can(self, cut: Cut) -> bool:
        try:
            self.config_of((cut,))
        except SlimError:
            return False
        return True

    def _candidate(self, bits: int | None, cuts: tuple[Cut, ...]) -> Candidate:
        config = self.config_of(cuts)
        text = {**config, **(config.get("text_config") or {})}
        quantize = None if bits is None else format_of(bits)
        heads = text.get("num_key_value_heads") or text.get("num_attention_heads") or 0
        return Candidate(
            bits=bits,
            cuts=cuts,
            layers=int(text.get("num_hidden_layers") or 0),
            kv_heads=int(heads),
            neurons=int(text.get("intermediate_size") or 0),
            channels=int(text.get("hidden_size") or 0),
            experts=next((int(text[key]) for key in _EXPERTS if text.get(key)), 0),
            cost=self._cost(config, quantize=quantize),
        )

    def within(self, fits: Callable[[Cost], bool], levels: int = LEVELS) -> list[Candidate]:
        """Return the candidates of a budget: whole at the most bits that fit, cut at more bits.

        Args:
            fits: Whether a cost meets it; a smaller model of the same kind costs no more.
            levels: How many formats with more bits than fit whole are cut.
        """
        fitting: list[Candidate] = []
        for bits in (*reversed(BITS), None):
            whole = self._try(bits, ())
            if whole is None:
                continue
            if fits(whole.cost):  # fewer bits of the same model are worse
                fitting = [whole]
                continue
            if not levels:
                break
            levels -= 1
            fitting += self._cut_to(bits, fits)
        whole = [one for one in fitting if not one.cuts]
        if whole and whole[0].bits is not None:  # bits of their own fill what is left
            fitting += self._mixed(fits, whole[0])
        return [one for one in fitting if one != self.original]

    def _mixed(self, fits: Callable[[Cost], bool], whole: Candidate) -> Iterator[Candidate]:
        """Yield the model whose layers have bits of their own, as many as fit."""
        cost, parameters = self.original.cost, self.original.cost.parameters
        least = math.ceil(800 * whole.cost.weight_bytes / parameters)
        for hundredths in range(800 * cost.weight_bytes // parameters - 1, least, -1):
            size = mixed_weight_bytes(hundredths / 100, parameters)
            saved = cost.weight_bytes - size
            others = whole.cost.disk_bytes - whole.cost.weight_bytes
            cheaper = replace(cost, weight_bytes=size, disk_bytes=size + others)
            if saved > 0 and fits(cheaper):
                yield replace(self.original, bits=4, cost=cheaper, bits_per_weight=hundredths / 100)
                return

    def nearest(self, excess: Callable[[Cost], float]) -> Candidate:
        """Return the candidate of the least ``excess`` over a budget that nothing meets."""
        hardest = [c for bits in BITS if (c := self._try(bits, ()))]
        hardest += [c for bits in BITS for c in self._cut_to(bits, lambda _: False, last=True)]
        return min(hardest or [self.original], key=lambda one: excess(one.cost))

    def _try(self, bits: int | None, cuts: tuple[Cut, ...]) -> Candidate | None:
        try:
            return self.candidate(bits, cuts)
        except SlimError:  # such widths or formats do not exist
            return None

    def _cut_to(
        self, bits: int | None, fits: Callable[[Cost], bool], *, last: bool = False
    ) -> Iterator[Candidate]:
        """Yield the mildest cut of each kind that fits; with ``last`` the hardest of each."""
        depth = self._mildest(bits, (), self._depths(), fits, last) if self.shortens else None
        if depth is not None:
            yield depth
        total = self.original.cost.parameters
        for axis in self.axes:
            narrow = self._mildest(bits, (), self._widths(axis, total), fits, last)
            same = narrow is not None and narrow.channels == self.original.channels
            if narrow is not None and not (axis == "hidden" and same):
                yield narrow
        if depth is not None and depth.cuts[0].layers >= 2 and self.axes:
            half = (Cut("depth", layers=depth.cuts[0].layers // 2),)
            shorter = self._try(None, half)
            if shorter is not None:
                widths = self._widths(self.axes[0], shorter.cost.parameters)
                both = self._mildest(bits, half, widths, fits, last)
                if both is not None:
                    yield both

    def _depths(self) -> list[Cut]:
        most = int((1 - FLOOR) * self.original.layers)
        return [Cut("depth", layers=count) for count in range(1, most + 1)]

    def _widths(self, axis: str, total: int) -> list[Cut]:
        least = FLOOR * self.original.cost.parameters
        targets = [round(total * (1 - i / STEPS)) for i in range(1, STEPS)]
        return [Cut(axis, target=target) for target in targets if target >= least]

    def _mildest(
        self,
        bits: int | None,
        before: tuple[Cut, ...],
        cuts: Sequence[Cut],
        fits: Callable[[Cost], bool],
        last: bool,
    ) -> Candidate | None:
        """Return the first of ever harder ``cuts`` that fits, by bisection; None if none does."""
        least = FLOOR * self.original.cost.parameters
        for cut in reversed(cuts) if last else ():  # the hardest that exists
            candidate = self._try(bits, (*before, cut))
            if candidate is not None and candidate.cost.parameters >= least:
                return candidate
        low, high, best = 0, len(cuts) - 1, None
        while low <= high and not last:
            middle = (low + high) // 2
            candidate = self._try(bits, (*before, cuts[middle]))
            if candidate is not None and fits(candidate.cost):
                best, high = candidate, middle - 1
            else:
                low = middle + 1
        if best is None or best.cost.parameters < least:
            return None
        return best


def budget(options: SlimOptions, original: Cost) -> Callable[[Cost], bool]:
    """Return whether a cost meets the budget of ``options``.

    A demanded speed is counted as that of reading the weights, which generation waits for; it is
    measured later.
    """

    def fits(one: Cost) -> bool:
        return (
            (options.memory is None or one.memory_bytes <= options.memory)
            and (options.disk is None or one.disk_bytes <= options.disk)
            and (options.speed is None or one.weight_bytes * options.speed <= original.weight_bytes)
        )

    return fits


def listed(space: SearchSpace, options: SlimOptions) -> list[Candidate]:
    """Return all candidates of the search, each once, largest first.

    Raises:
        SlimError: If nothing meets the budget, with the nearest.
    """
    if options.has_budget:
        fitting = space.within(budget(options, space.original.cost))
        if not fitting and not budget(options, space.original.cost)(space.original.cost):
            raise SlimError(*_nothing(space, options))
    else:
        whole = space.original.cost.disk_bytes
        fitting = []
        for fraction in LADDER:
            fitting += space.within(lambda one, most=fraction * whole: one.disk_bytes <= most, 1)
    by_key = {one.key: one for one in fitting}
    return sorted(by_key.values(), key=lambda one: -one.cost.disk_bytes)


def _nothing(space: SearchSpace, options: SlimOptions) -> tuple[str, str]:
    original = space.original.cost

    def excess(one: Cost) -> float:
        return max(
            one.memory_bytes / options.memory if options.memory else 0.0,
            one.disk_bytes / options.disk if options.disk else 0.0,
            one.weight_bytes * (options.speed or 0.0) / original.weight_bytes,
        )

    nearest = space.nearest(excess)
    demands, has = [], []
    if options.disk is not None:
        demands.append(f"--disk {human_bytes(options.disk)}")
        has.append(f"{human_bytes(nearest.cost.disk_bytes)} on disk")
    if options.memory is not None:
        demands.append(f"--memory {human_bytes(options.memory)}")
        has.append(f"{human_bytes(nearest.cost.memory_bytes)} in memory")
    if options.speed is not None:
        demands.append(f"--speed {options.speed:g}x")
        has.append(f"{nearest.cost.weight_bytes / original.weight_bytes:.0%} of the weights")
    return (
        f"no smaller model meets {' and '.join(demands)}: the nearest is "
        f"{nearest.name(space.original)}, {', '.join(has)}",
        "set a larger budget, or begin with a smaller model",
    )
