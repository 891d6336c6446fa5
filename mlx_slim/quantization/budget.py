"""A model in a given number of bytes: how large each mix of bits would be, and the best that fits.

Invariant: sizes are counted from shapes, before any weight is read: a budget that nothing meets is
refused there, with the nearest. Layers that the model's own class leaves dense, or gives bits of
their own, are counted as they are. Try it: ``mlx-slim quantize MODEL -o DIR --target-bytes 300MB``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim.adapters.inject import sites
from mlx_slim.adapters.lora import dimensions
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import SlimError
from mlx_slim.models.quantized import LayerFormat
from mlx_slim.models.structure import block_numbers, is_linear
from mlx_slim.quantization.allocation import StoredAs, allocate, layer_bytes, overhead_bytes
from mlx_slim.quantization.options import CompressOptions
from mlx_slim.quantization.policy import make_policy
from mlx_slim.quantization.sensitivity import BITS, Losses
from mlx_slim.units import human_bytes

_SIZED = ("rtn", "blockwise")  # methods that take a number of bits for each layer


def check_size(options: CompressOptions) -> None:
    """Refuse what excludes a size, and what is only for one.

    Raises:
        SlimError: With what would work.
    """
    both = options.target_bytes is not None and options.bits_per_weight is not None
    if both:
        raise SlimError(
            "--target-bytes and --bits-per-weight exclude each other", "leave one of them out"
        )
    if not options.sized:
        if options.sensitivity is not None:
            raise SlimError(
                f"--sensitivity {options.sensitivity} chooses bits for a size, and none is set",
                "set --target-bytes or --bits-per-weight",
            )
        return
    wrong = [f"--recipe {options.recipe}"] if options.recipe is not None else []
    wrong += [f"--method {options.method}"] if options.method not in _SIZED else []
    wrong += [] if options.embed_bits is None else [f"--embed-bits {options.embed_bits}"]
    wrong += [f"--mode {options.quantize.mode}"] if options.quantize.mode != "affine" else []
    if wrong:
        raise SlimError(
            f"{' and '.join(wrong)}: a size is met in mode affine, by rounding (rtn) or "
            "training (blockwise)",
            "leave it out, or --target-bytes and --bits-per-weight",
        )


@dataclass(frozen=True)
class LayerSizes:
    """The sizes that a model can have.

    Attributes:
        shapes: Path -> dense weight (..., O, I) of each layer whose bits are to be chosen.
        blocks: Path -> number of its block, of those inside of blocks.
        group_size: Of their formats.
        other_bytes: Of all other parameters.
        names: Of all tensors, were every layer quantized.
        numbers: Parameters of the dense model.
        itemsize: Bytes of a stored float.
        adapter_bytes: Of the file of adapters that correct the error (``compensation.py``), were
            every layer quantized.
    """

    shapes: dict[str, tuple[int, ...]]
    blocks: dict[str, int]
    group_size: int
    other_bytes: int
    names: list[str]
    numbers: int
    itemsize: int
    adapter_bytes: int = 0

    def format(self, bits: int) -> LayerFormat:
        """Return the format of a layer in ``bits``."""
        return LayerFormat(self.group_size, bits)

    def nbytes(self, formats: Mapping[str, LayerFormat | None]) -> int:
        """Return the bytes of all parameters, with a format for each of ``shapes``."""
        layers = (
            layer_bytes(shape, formats[path], self.itemsize) for path, shape in self.shapes.items()
        )
        return self.other_bytes + sum(layers)

    def uniform(self, bits: int | None) -> int:
        """Return the bytes of all parameters with every layer in ``bits``; None is dense."""
        return self.nbytes(dict.fromkeys(self.shapes, None if bits is None else self.format(bits)))

    def limit(self, options: CompressOptions) -> int:
        """Return the bytes that all parameters may take by ``options``.

        Raises:
            SlimError: If no mix of bits is that small, or the dense model already is.
        """
        if options.target_bytes is not None:
            limit = options.target_bytes - overhead_bytes(self.names, options.target_bytes)
            limit -= self.adapter_bytes
            target = human_bytes(options.target_bytes)
        else:
            assert options.bits_per_weight is not None
            limit = math.floor(options.bits_per_weight * self.numbers / 8)
            target = f"{options.bits_per_weight:g} bits per weight"
        smallest, dense = self.uniform(BITS[0]), self.uniform(None)
        if smallest > limit:
            raise SlimError(
                f"the target of {target} cannot be reached: with {BITS[0]} bits in every layer the "
                f"model takes {self._described(smallest)}",
                "set at least that, a larger --group-size, or prune first (mlx-slim prune)",
            )
        if dense <= limit:
            raise SlimError(
                f"the model takes {self._described(dense)} already, the target is {target}",
                "set a smaller target",
            )
        return limit

    def _described(self, nbytes: int) -> str:
        files = nbytes + overhead_bytes(self.names, nbytes) + self.adapter_bytes
        return f"{human_bytes(files)} ({nbytes * 8 / self.numbers:.2f} bits per weight)"

    def choose(self, losses: Losses, limit: int) -> dict[str, StoredAs]:
        """Return the choice of every layer, all parameters within ``limit`` bytes.

        Args:
            losses: Of every layer of ``shapes`` at each of ``BITS``.
            limit: Of all parameters, at least ``uniform(BITS[0])``.
        """
        choices = {
            path: [
                StoredAs(None, layer_bytes(shape, None, self.itemsize), 0.0),
                *(
                    StoredAs(
                        self.format(bits),
                        layer_bytes(shape, self.format(bits), self.itemsize),
                        losses[path][bits],
                    )
                    for bits in BITS
                ),
            ]
            for path, shape in self.shapes.items()
        }
        return allocate(choices, limit - self.other_bytes)


def space_of(
    model: nn.Module, quantize: QuantizeConfig, stored: mx.Dtype, compensate: int | None = None
) -> LayerSizes:
    """Return the sizes that ``model`` can have; no weight is read.

    Args:
        model: Dense, its weights read or not (``models.opening.open_weights``).
        quantize: Its group size counts.
        stored: Dtype of the floating parameters on disk.
        compensate: Rank of adapters that correct the error; None makes none.

    Raises:
        SlimError: If no layer can be quantized.
    """
    from mlx_lm.utils import get_total_parameters

    policy = make_policy(model, quantize)
    common = LayerFormat(quantize.group_size, quantize.bits, quantize.mode)
    predicate = getattr(model, "cast_predicate", None) or (lambda path: True)

    def size(path: str, value: mx.array) -> int:
        casts = mx.issubdtype(value.dtype, mx.floating) and predicate(path)
        return value.size * (stored.size if casts else value.dtype.size)

    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    chosen = {f"{path}.weight": path for path in policy.chosen}
    shapes: dict[str, tuple[int, ...]] = {}
    names, other_bytes = [], 0
    for name, value in parameters.items():
        names.append(name)
        if name not in chosen:
            other_bytes += size(name, value)
            continue
        path = chosen[name]
        names += [f"{path}.scales", f"{path}.biases"]
        if policy.chosen[path] == common:
            shapes[path] = value.shape
        else:
            other_bytes += layer_bytes(value.shape, policy.chosen[path], stored.size)
    numbers = get_total_parameters(model)
    blocks = block_numbers(model, shapes)
    return LayerSizes(
        shapes,
        blocks,
        quantize.group_size,
        other_bytes,
        names,
        numbers,
        stored.size,
        _adapter_bytes(model, policy.chosen, stored, compensate or 0),
    )


def _adapter_bytes(
    model: nn.Module, chosen: Mapping[str, LayerFormat], stored: mx.Dtype, rank: int
) -> int:
    """Return the bytes of the file of adapters on all ``chosen`` layers that take the rank."""
    adapted = [
        site
        for site in sites(model)
        if rank
        and site.block is not None
        and site.path in chosen
        and is_linear(site.module)
        and min(dimensions(site.module)) >= rank
    ]
    if not adapted:
        return 0
    nbytes = sum(rank * sum(dimensions(site.module)) for site in adapted) * stored.size
    names = [f"{site.path}.lora_{factor}" for site in adapted for factor in "ab"]
    return nbytes + overhead_bytes(names, nbytes)
