"""Intruder dimensions: directions that tuning put on top of a weight and the base did not have.

A left singular vector of the tuned weight among its k largest is an intruder if no left singular
vector of the base is within ε of it in cosine (arXiv 2410.21228). Invariant: W_0 is what the tuning
started from (dequantized under QLoRA), the tuned weight is what the adapter computes, in float32;
one matrix at a time is in memory besides the models. Try it:
``mlx-slim analyze intruders BASE --adapter runs/a/adapters -o runs/a/intruders``.

Shapes: O rows, I columns, K base directions, J tuned directions, R rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.adapters.dora import DoRALinear
from mlx_slim.adapters.inject import adapters_of, sites
from mlx_slim.adapters.lora import Adapter, LoRAEmbedding, is_experts
from mlx_slim.adapters.store import load_adapter
from mlx_slim.analyze.options import IntruderOptions
from mlx_slim.analyze.spectrum import (
    Spectrum,
    cached_spectrum,
    effective_rank,
    leading,
    product_singular_values,
    singular_values,
)
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import SlimError
from mlx_slim.models.load import load
from mlx_slim.models.quantized import dequantize_weight, is_quantized
from mlx_slim.models.structure import is_linear
from mlx_slim.models.tensors import few
from mlx_slim.quantization.apply import quantize_model
from mlx_slim.quantization.base import load_base
from mlx_slim.reading import JsonObject, library_errors, read_object, short

SWEEP_K = (1, 5, 10, 20)
SWEEP_EPSILON = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Pair:
    """One weight before and after tuning.

    Attributes:
        path: Of the layer.
        base_OI: Float32.
        tuned_OI: Float32.
        factors: (s·B (O, R), A (R, I)) where the difference is their product; else None.
    """

    path: str
    base_OI: np.ndarray
    tuned_OI: np.ndarray
    factors: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class MatrixSpectra:
    """What tuning did to one weight.

    Attributes:
        path: Of the layer.
        shape: (O, I).
        intruders: How many of the k leading directions are.
        energy: Σσ² of the intruders / Σσ² of the tuned weight.
        delta_norm: ‖ΔW‖ / ‖W_0‖ (Frobenius).
        effective_rank: Of ΔW: exp of the entropy of its singular values.
        sigma: Leading singular values of the tuned weight.
        cosine: Of each, the largest |cosine| with a direction of the base.
        energies: (Σσ² of intruders, Σσ² of tuned, ‖ΔW‖², ‖W_0‖²), from which the totals are made.
        seconds: What this took.
    """

    path: str
    shape: tuple[int, int]
    intruders: int
    energy: float
    delta_norm: float
    effective_rank: float
    sigma: list[float]
    cosine: list[float]
    energies: tuple[float, float, float, float] = field(repr=False)
    seconds: float


@dataclass(frozen=True)
class Intruders:
    """All matrices, and the totals.

    Attributes:
        base: What was given.
        tuned: Adapter folder or tuned model.
        kind: ``lora``, ``dora`` or ``full``.
        k: Leading directions looked at.
        epsilon: Largest cosine of an intruder.
        matrices: In the model's order.
    """

    base: str
    tuned: str
    kind: str
    k: int
    epsilon: float
    matrices: list[MatrixSpectra]

    def overall(self) -> dict[str, float]:
        """Return the totals over all matrices."""
        intruder_energy, whole, moved, stayed = np.array([m.energies for m in self.matrices]).sum(
            axis=0
        )
        intruders = sum(m.intruders for m in self.matrices)
        return {
            "matrices": len(self.matrices),
            "intruders": intruders,
            "matrices_with_intruders": sum(m.intruders > 0 for m in self.matrices),
            "intruders_per_matrix": intruders / len(self.matrices),
            "energy": float(intruder_energy / whole),
            "delta_norm": float(np.sqrt(moved / stayed)),
            "effective_rank": float(np.mean([m.effective_rank for m in self.matrices])),
        }

    def sweep(self) -> list[dict[str, float]]:
        """Return the count for other k and ε."""
        return [
            {"k": k, "epsilon": epsilon, "intruders": self.count(k, epsilon)}
            for k in sorted({*SWEEP_K, self.k})
            for epsilon in sorted({*SWEEP_EPSILON, self.epsilon})
        ]

    def count(self, k: int, epsilon: float) -> int:
        """Return the intruders among the k leading directions of every matrix."""
        return sum(sum(c < epsilon for c in m.cosine[:k]) for m in self.matrices)

    def as_record(self) -> JsonObject:
        """Return ``intruders.json`` without its provenance."""
        matrices = [asdict(m) for m in self.matrices]
        for record in matrices:
            del record["energies"]
        head = {key: getattr(self, key) for key in ("base", "tuned", "kind", "k", "epsilon")}
        return {**head, "overall": self.overall(), "sweep": self.sweep(), "matrices": matrices}


def examine(
    pair: Pair, k: int, epsilon: float, cache: Path | None = None, deepest: int = 0
) -> MatrixSpectra:
    """Return what tuning did to one weight.

    Args:
        pair: The weight, before and after.
        k: Leading directions in which intruders are counted.
        epsilon: A direction is an intruder if its largest cosine is below this.
        cache: Folder of base spectra; None keeps none.
        deepest: Leading directions to report, at least k.
    """
    began = time.perf_counter()
    base = cached_spectrum(pair.base_OI, cache)
    delta_OI = pair.tuned_OI - pair.base_OI
    moved, stayed = _square(delta_OI), _square(pair.base_OI)
    count = min(max(k, deepest), len(base.sigma_K))
    if moved == 0:
        top = Spectrum(base.left_OK[:, :count], base.sigma_K[:count])
        cosine, values = np.ones(count), np.zeros(1)
    else:
        added_OR = pair.factors[0] if pair.factors else delta_OI[:, :0]
        nearby = [added_OR, base.left_OK[:, : 2 * count]]
        top = leading(pair.tuned_OI, count, np.concatenate(nearby, axis=1))
        cosine = nearest_cosine(base, top)
        values = (
            product_singular_values(*pair.factors) if pair.factors else singular_values(delta_OI)
        )
    new = cosine[:k] < epsilon
    energies = (float((top.sigma_K[:k][new] ** 2).sum()), _square(pair.tuned_OI), moved, stayed)
    return MatrixSpectra(
        path=pair.path,
        shape=(pair.base_OI.shape[0], pair.base_OI.shape[1]),
        intruders=int(new.sum()),
        energy=energies[0] / energies[1] if energies[1] else 0.0,
        delta_norm=float(np.sqrt(moved / stayed)) if stayed else 0.0,
        effective_rank=effective_rank(values),
        sigma=[round(float(s), 6) for s in top.sigma_K],
        cosine=[round(float(c), 6) for c in cosine],
        energies=energies,
        seconds=round(time.perf_counter() - began, 3),
    )


def nearest_cosine(base: Spectrum, tuned: Spectrum) -> np.ndarray:
    """Return (J,) the largest |cosine| of each direction of ``tuned`` with one of ``base``."""
    return np.minimum(np.abs(base.left_OK.T @ tuned.left_OK).max(axis=0), 1.0)


def _square(weight_OI: np.ndarray) -> float:
    flat = weight_OI.reshape(-1)
    return float(np.dot(flat, flat))


def _numpy(weight: mx.array) -> np.ndarray:
    return np.array(weight.astype(mx.float32))


def _of_experts(adapter: Adapter, path: str) -> Iterator[Pair]:
    """Yield the weight of each expert of a layer before and after."""
    base, merged = (_numpy(w) for w in (dequantize_weight(adapter.base), adapter.merged_weight()))
    a_ERI, b_EOR = (_numpy(factor) for factor in adapter.factors())
    for expert in range(len(base)):
        factors = adapter.scale * b_EOR[expert], a_ERI[expert]
        yield Pair(f"{path}.{expert}", base[expert], merged[expert], factors)


def pairs_of(adapter: Adapter, path: str) -> Iterator[Pair]:
    """Yield what an adapter changes: one weight, or that of each expert of its layer."""
    if is_experts(adapter.base):
        yield from _of_experts(adapter, path)
    else:
        yield _of_layer(adapter, path)


def _of_layer(adapter: Adapter, path: str) -> Pair:
    base = _numpy(dequantize_weight(adapter.base))
    factors = None
    if not isinstance(adapter, DoRALinear):
        a_IR, b_RO = (_numpy(factor) for factor in adapter.factors())
        if isinstance(adapter, LoRAEmbedding):  # W + s A B there, rows are tokens
            factors = adapter.scale * a_IR, b_RO
        else:
            factors = adapter.scale * b_RO.T, a_IR.T
        if not factors[0].any() or not factors[1].any():
            return Pair(path, base, base, factors)
    return Pair(path, base, _numpy(adapter.merged_weight()), factors)


def adapted_model(source: str, adapter: Path) -> nn.Module:
    """Return the base of an adapter folder with the adapter on it.

    A dense base is quantized first where the adapter's run did so (QLoRA); runs of earlier versions
    record it in ``run.json`` only.

    Raises:
        SlimError: As ``load`` and ``load_adapter`` do.
    """
    loaded = load_base(source, [adapter])
    record = adapter.parent / "run.json"
    recipe = read_object(record, recipe=dict)["recipe"] if record.is_file() else {}
    if recipe.get("method") == "qlora" and not is_quantized(loaded.model):
        with library_errors(
            f"{short(record)}: recipe cannot be used", "copy the run again, or repeat it"
        ):
            settings = QuantizeConfig(**recipe["quantize"])
        quantize_model(loaded.model, loaded.config, settings)
    load_adapter(loaded.model, adapter)
    return loaded.model


def adapter_pairs(source: str, adapter: Path) -> tuple[str, Iterator[Pair]]:
    """Return (kind, pairs) of a base and an adapter folder.

    Raises:
        SlimError: As ``adapted_model``.
    """
    adapters = adapters_of(adapted_model(source, adapter))
    kind = "dora" if any(isinstance(a, DoRALinear) for _, a in adapters) else "lora"
    return kind, (pair for path, module in adapters for pair in pairs_of(module, path))


def model_pairs(source: str, tuned: str) -> tuple[str, Iterator[Pair]]:
    """Return (kind, pairs) of two models: the linear layers of their blocks.

    Raises:
        SlimError: If they cannot be loaded, or their layers differ.
    """
    before, after = (
        {s.path: s.module for s in sites(load(name).model) if s.block is not None}
        for name in (source, tuned)
    )
    before, after = (
        {path: m for path, m in side.items() if is_linear(m)} for side in (before, after)
    )
    if other := sorted(before.keys() ^ after.keys()):
        raise SlimError(f"{tuned} has other layers than {source}: {few(other)}")

    def pairs() -> Iterator[Pair]:
        for path, module in before.items():
            one, two = (_numpy(dequantize_weight(m)) for m in (module, after[path]))
            if one.shape != two.shape:
                raise SlimError(
                    f"{path} is {two.shape} in {tuned} and {one.shape} in {source}",
                    "give the model that was tuned as BASE",
                )
            yield Pair(path, one, two)

    return "full", pairs()


def find_intruders(
    base: str,
    *,
    adapter: Path | None = IntruderOptions.adapter,
    tuned: str | None = IntruderOptions.tuned,
    k: int = IntruderOptions.k,
    epsilon: float = IntruderOptions.epsilon,
    cache: Path | None = None,
    progress: Callable[[MatrixSpectra], None] = lambda matrix: None,
) -> Intruders:
    """Compare every tuned weight with its base.

    Args:
        base: Hub id or folder that the tuning started from.
        adapter: Adapter folder, or
        tuned: a whole tuned model.
        k: Leading directions looked at.
        epsilon: Largest cosine of an intruder.
        cache: Folder of base spectra; None keeps none.
        progress: Called with each matrix.

    Raises:
        SlimError: If neither or both of ``adapter`` and ``tuned`` are given, or do not fit.
    """
    if (adapter is None) == (tuned is None):
        raise SlimError(
            "give either an adapter or a tuned model", "--adapter DIR, or --tuned MODEL"
        )
    kind, pairs = adapter_pairs(base, adapter) if adapter else model_pairs(base, str(tuned))
    matrices = []
    for pair in pairs:
        matrices.append(examine(pair, k, epsilon, cache, max(SWEEP_K)))
        progress(matrices[-1])
    return Intruders(base, str(adapter or tuned), kind, k, epsilon, matrices)
