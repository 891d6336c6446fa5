"""Repair of an adapter: its intruder dimensions made smaller, at the same rank.

``keep`` is the share of each intruder σ u vᵀ of the tuned weight that stays:
ΔW' = ΔW − (1 − keep) Σ σ u vᵀ, and the adapter of rank R nearest to it, √σ in either factor. It is
PEFT's ``reduce_intruder_dimension`` with ``mitigation_lambda`` = keep (its code; its docstring says
the opposite), after arXiv 2410.21228. Invariant: the factors of a weight without intruders stay as
they were; ΔW' is decomposed from its factors in float64, never formed. Try it:
``mlx-slim analyze intruders BASE --adapter runs/a/adapters --repair 0.75 -o repaired``.

Shapes: O rows, I columns, R rank, M intruders, C = R + M.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_slim.adapters.dora import DoRALinear
from mlx_slim.adapters.inject import adapters_of
from mlx_slim.adapters.lora import Adapter, LoRAEmbedding, is_experts
from mlx_slim.adapters.store import CONFIG, WEIGHTS
from mlx_slim.analyze.intruders import (
    SWEEP_K,
    Intruders,
    MatrixSpectra,
    Pair,
    adapted_model,
    examine,
    nearest_cosine,
    pairs_of,
)
from mlx_slim.analyze.options import IntruderOptions
from mlx_slim.analyze.spectrum import cached_spectrum, spectrum
from mlx_slim.artifacts import load_tensors, save_tensors, write_json
from mlx_slim.errors import SlimError
from mlx_slim.quantization.base import RECORD
from mlx_slim.reading import JsonObject, read_object

_NEAR = 0.05  # ``examine`` is within this of an exact cosine


@dataclass(frozen=True)
class Repaired:
    """An adapter with smaller intruders.

    Attributes:
        before: Its intruders as it was.
        after: Its intruders as it is now.
        keep: The share of each that stayed.
        tensors: Of ``adapters.safetensors``, in the dtypes of the original.
        config: Of ``adapter_config.json``.
    """

    before: Intruders
    after: Intruders
    keep: float
    tensors: dict[str, mx.array]
    config: JsonObject

    def as_record(self) -> JsonObject:
        """Return the entry ``repair`` of ``intruders.json``."""
        old, new = self.before.matrices, self.after.matrices
        changed = [one.path for one, other in zip(old, new, strict=True) if one is not other]
        return {"keep": self.keep, "repaired": changed, "overall": self.after.overall()}

    def write(self, folder: Path) -> None:
        """Write the adapter into a folder that exists."""
        save_tensors(folder / WEIGHTS, self.tensors)
        write_json(folder / CONFIG, self.config)


def repair_intruders(
    base: str,
    adapter: Path,
    keep: float,
    *,
    k: int = IntruderOptions.k,
    epsilon: float = IntruderOptions.epsilon,
    cache: Path | None = None,
    progress: Callable[[MatrixSpectra], None] = lambda matrix: None,
) -> Repaired:
    """Return ``adapter`` with ``keep`` of each intruder; arguments as ``find_intruders``.

    Raises:
        SlimError: If the adapter is a DoRA, or it does not fit the base.
    """
    adapters = adapters_of(adapted_model(base, adapter))
    if any(isinstance(module, DoRALinear) for _, module in adapters):
        raise SlimError(
            f"{adapter} is a DoRA adapter: its update is not a product of two factors",
            "--repair takes adapters of LoRA and QLoRA runs",
        )
    tensors = load_tensors(adapter / WEIGHTS)
    before: list[MatrixSpectra] = []
    after: list[MatrixSpectra] = []
    for path, module in adapters:
        for index, pair in enumerate(pairs_of(module, path)):
            before.append(examine(pair, k, epsilon, cache, max(SWEEP_K)))
            progress(before[-1])
            reduced = _reduced(pair, before[-1], keep, k, epsilon, cache)
            if reduced is None:
                after.append(before[-1])
                continue
            after.append(examine(reduced, k, epsilon, cache, max(SWEEP_K)))
            _store(tensors, path, module, index, reduced)
    intruders = Intruders(base, str(adapter), "lora", k, epsilon, before)
    config: JsonObject = {**read_object(adapter / CONFIG), "intruders_kept": keep}
    if RECORD in config:  # its folder is beside the original
        config[RECORD] = {**config[RECORD], "folder": None}
    return Repaired(intruders, replace(intruders, matrices=after), keep, tensors, config)


def _reduced(
    pair: Pair, examined: MatrixSpectra, keep: float, k: int, epsilon: float, cache: Path | None
) -> Pair | None:
    """Return the weight with smaller intruders; None where it has none."""
    if pair.factors is None or min(examined.cosine[:k]) >= min(1.0, epsilon + _NEAR):
        return None
    tuned = spectrum(pair.tuned_OI)
    intruding = nearest_cosine(cached_spectrum(pair.base_OI, cache), tuned)[:k] < epsilon
    if not intruding.any():
        return None
    u_OM = tuned.left_OK[:, :k][:, intruding].astype(np.float64)
    one_OR, other_RI = (factor.astype(np.float64) for factor in pair.factors)
    left_OC = np.concatenate([one_OR, (keep - 1) * u_OM], axis=1)
    right_CI = np.concatenate([other_RI, u_OM.T @ pair.tuned_OI.astype(np.float64)])
    factors = truncated(left_OC, right_CI, one_OR.shape[1])
    tuned_OI = pair.base_OI + (factors[0] @ factors[1]).astype(np.float32)
    return Pair(pair.path, pair.base_OI, tuned_OI, factors)


def truncated(
    left_OC: np.ndarray, right_CI: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors (O, R), (R, I) of the matrix of rank R nearest to a product, float64.

    Either has √σ; where the product has a smaller rank, the rest is zero.
    """
    q_OC, r_CC = np.linalg.qr(left_OC)
    p_IC, l_CC = np.linalg.qr(right_CI.T)
    u, sigma, vt = np.linalg.svd(r_CC @ l_CC.T, full_matrices=False)
    root = np.sqrt(sigma[:rank])
    one, other = q_OC @ (u[:, :rank] * root), (root[:, None] * vt[:rank]) @ p_IC.T
    lacking = rank - len(root)
    return np.pad(one, ((0, 0), (0, lacking))), np.pad(other, ((0, lacking), (0, 0)))


def _store(
    tensors: dict[str, mx.array], path: str, adapter: Adapter, index: int, pair: Pair
) -> None:
    """Replace the factors of one weight, expert ``index`` where a layer has several.

    The scale is divided out of the product, so that both factors keep the same norm.
    """
    assert pair.factors is not None
    root = np.sqrt(abs(adapter.scale))
    left_OR, right_RI = pair.factors[0] / (np.sign(adapter.scale) * root), pair.factors[1] / root
    if is_experts(adapter.base):
        new = {"lora_a": right_RI, "lora_b": left_OR}
    elif isinstance(adapter, LoRAEmbedding):
        new = {"lora_a": left_OR, "lora_b": right_RI}
    else:
        new = {"lora_a": right_RI.T, "lora_b": left_OR.T}
    for name, value in new.items():
        old = tensors[f"{path}.{name}"]
        factor = mx.array(value.astype(np.float32)).astype(old.dtype)
        if is_experts(adapter.base):
            factor = mx.concatenate([old[:index], factor[None], old[index + 1 :]])
        mx.eval(factor)
        tensors[f"{path}.{name}"] = factor
