"""Experts: scores against a plain loop, removed experts against logits of −∞, folder to folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load as stock_load

from mlx_slim.errors import SlimError
from mlx_slim.models import structure
from mlx_slim.models.build import build
from mlx_slim.models.kinds import EXPERTS
from mlx_slim.models.load import load
from mlx_slim.models.mixtures import mixture_of
from mlx_slim.planner.shapes import leaves
from mlx_slim.pruning import surgery
from mlx_slim.pruning.counts import count
from mlx_slim.pruning.importance import group_importance
from mlx_slim.pruning.options import PruneOptions
from mlx_slim.pruning.plan import plan
from mlx_slim.pruning.run import prune
from mlx_slim.runtime import to_float
from tests.support.prune import ROWS, TOKENS, layer_of, load_tiny, relative_gap, stock_of
from tests.support.tiny import MIXTURES, tiny_model

_NORMALISED = [("qwen3_moe", {"norm_topk_prob": norm}) for norm in (True, False)]
CASES = [
    *_NORMALISED,
    ("mixtral", {}),
    ("olmoe", {"norm_topk_prob": True}),
    ("qwen2_moe", {}),
    ("gpt_oss", {"num_hidden_layers": 2}),
    ("deepseek_v3", {}),
]


class _Masked(nn.Module):
    """A router whose logits of some experts are −∞."""

    def __init__(self, router: Any, removed: list[int]) -> None:
        super().__init__()
        self._router, self._removed = router, removed

    def __call__(self, x: mx.array) -> mx.array:
        logits = self._router(x)
        logits[..., mx.array(self._removed)] = -mx.inf
        return logits


def _silence(block: Any, path: str, removed: list[int]) -> None:
    """Keep the router of a layer from ever choosing the experts ``removed``."""
    holder = layer_of(block, path)
    name = "router" if "router" in holder else "gate"
    if isinstance(holder[name], nn.Linear):
        holder[name] = _Masked(holder[name], removed)
    else:  # scores are sigmoids, and what is added to them decides the choice
        holder[name].e_score_correction_bias[mx.array(removed)] = -1e9


@pytest.mark.parametrize(("architecture", "changes"), CASES)
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:1, :5]])  # many choices are sorted by expert
def test_removed_experts_equal_logits_of_minus_infinity(
    tmp_path: Path, architecture: str, changes: dict[str, Any], tokens: mx.array
) -> None:
    source = load_tiny(tmp_path, architecture, **changes)
    mixture = mixture_of(source.config)
    assert mixture is not None
    removed = [[1], [0], [2]] if mixture.groups == 1 else [[1, 5], [0, 6], [3, 4]]
    retained = [
        np.setdiff1d(np.arange(mixture.count), gone) if family else np.zeros(0, np.int64)
        for family, gone in zip(mixture.families, removed, strict=False)
    ]
    small, config = surgery.with_groups(
        source.model, source.config, {EXPERTS: retained}, uniform=True
    )
    sizes = {EXPERTS: [len(experts) for experts in retained]}
    expected = count(source.model, mixture).with_sizes(sizes)
    assert sum(value.size for _, value in leaves(small)) == expected
    assert relative_gap(small, stock_of(config, small), tokens) < 1e-5
    before = source.model(tokens)
    for block, family, gone in zip(
        structure.blocks(source.model), mixture.families, removed, strict=False
    ):
        if family is not None:
            _silence(block, family.output, gone)
    if tokens.size > 5:
        assert mx.array_equal(source.model(tokens), small(tokens))
    else:  # products of few rows with a router of fewer columns may round in another order
        assert relative_gap(source.model, small, tokens) < 1e-6
    assert to_float(mx.abs(before - small(tokens)).max()) > 1e-3


class _Alone(nn.Module):
    """A router that computes each expert's logit by itself.

    How the product of a matrix rounds depends on the number of its columns.
    """

    def __init__(self, router: Any) -> None:
        super().__init__()
        self._router = router

    def __call__(self, x: mx.array) -> mx.array:
        logits = (x[..., None, :] * self._router.weight).sum(-1)
        return logits + self._router.bias if "bias" in self._router else logits


def _add_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the experts that a router chooses come in the order of their numbers.

    ``argpartition`` returns them in any order, and the sum of three or more rounds with it.
    """
    partition = mx.argpartition

    def ordered(a: mx.array, kth: int, axis: int = -1) -> mx.array:
        indices, first = partition(a, kth=kth, axis=axis), kth % a.shape[axis]
        assert axis == -1
        chosen = first + (kth >= 0 and first < a.shape[-1] // 2)  # the smallest, or the largest
        ends = (indices[..., :chosen], indices[..., chosen:])
        return mx.concatenate([mx.sort(end, axis=-1) for end in ends], axis=-1)

    monkeypatch.setattr(mx, "argpartition", ordered)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True}),
        ("mixtral", {"num_local_experts": 16, "num_experts_per_tok": 4}),
        ("olmoe", {"num_experts": 16, "num_experts_per_tok": 4}),
        ("gpt_oss", {"num_hidden_layers": 2, "num_local_experts": 16, "num_experts_per_tok": 4}),
    ],
)
def test_of_many_experts_only_the_rounding_of_two_sums_differs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    changes: dict[str, Any],
) -> None:
    source = load_tiny(tmp_path, architecture, **changes)
    mixture = mixture_of(source.config)
    assert mixture is not None and mixture.count == 16
    removed = [0, 3, 7, 12]
    retained = np.setdiff1d(np.arange(16), removed)
    layers = [retained if family else np.zeros(0, np.int64) for family in mixture.families]
    small, _ = surgery.with_groups(source.model, source.config, {EXPERTS: layers}, uniform=True)
    routers = []
    for index, family in enumerate(mixture.families):
        if family is None:
            continue
        _silence(structure.blocks(source.model)[index], family.output, removed)
        full, cut = (
            layer_of(structure.blocks(model)[index], family.output)
            for model in (source.model, small)
        )
        name = "router" if "router" in full else "gate"
        routers += [(full[name], "_router", full[name]._router), (cut, name, cut[name])]
    assert relative_gap(source.model, small, TOKENS) < 1e-6
    for holder, name, router in routers:
        setattr(holder, name, _Alone(router))
    _add_by_index(monkeypatch)
    assert mx.array_equal(source.model(TOKENS), small(TOKENS))


@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_an_expert_is_worth_its_weighted_output_over_the_tokens_it_gets(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    """A plain loop: the change of a layer's output when an expert answers zero is its part."""
    source = load_tiny(tmp_path, architecture, **changes)
    mixture = mixture_of(source.config)
    assert mixture is not None
    scores = group_importance(source.model, "reap", (EXPERTS,), ROWS, mixture=mixture)
    layer = next(i for i, family in enumerate(mixture.families) if family)
    family = mixture.families[layer]
    assert family is not None
    assert sorted(scores) == [f"{i}.experts" for i, one in enumerate(mixture.families) if one]
    block: Any = structure.blocks(source.model)[layer]
    holder = layer_of(block, family.output)
    name = next(n for n in ("switch_mlp", "experts") if n in holder)
    inputs: list[mx.array] = []

    class Look(nn.Module):
        def __call__(self, x: mx.array) -> mx.array:
            inputs.append(x)
            return holder(x)

    block[family.output] = Look()
    source.model(ROWS[:, :-1])
    block[family.output] = holder
    experts, (x,) = holder[name], inputs
    whole = holder(x)
    for expert in range(mixture.count):
        sent: list[mx.array] = []

        class Without(nn.Module):
            def __call__(
                self,
                x: mx.array,
                indices: mx.array,
                expert: int = expert,
                sent: list[mx.array] = sent,
            ) -> mx.array:
                sent.append((indices == expert).any(-1).reshape(-1))
                return mx.where((indices == expert)[..., None], 0.0, experts(x, indices))

        holder[name] = Without()
        part = np.array(whole - holder(x)).reshape(-1, whole.shape[-1])
        holder[name] = experts
        tokens = np.array(sent[0])
        expected = np.linalg.norm(part[tokens], axis=1).mean() if tokens.any() else 0.0
        assert scores[f"{layer}.experts"][expert] == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., PruneOptions]:
    text = tmp_path / "notes.txt"
    text.write_text("\n".join(f"{i}: a line of plain words to look at" for i in range(60)))

    def make(**changes: Any) -> PruneOptions:
        settings = {"samples": 4, "length": 32, "held_out": 64, "calibration": str(text)}
        return PruneOptions(**{**settings, **changes})

    return make


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss"])
def test_a_mixture_from_folder_to_folder(
    tmp_path: Path, options: Callable[..., PruneOptions], architecture: str
) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": 2} if architecture == "gpt_oss" else {}
    source = tiny_model(tmp_path / "source", architecture, **changes)
    result = prune(source, tmp_path / "out", options(method="reap", ratio=0.3))
    stock: Any = stock_load(str(tmp_path / "out"))[0]
    assert relative_gap(load(tmp_path / "out").model, stock) < 1e-5
    record = result.details
    assert record.parameters_after == sum(value.size for _, value in leaves(stock))
    assert {layer.groups["experts"].after for layer in record.layers if layer.groups} == {3}
    assert record.method == "reap" and record.stock_mlx_lm_reads_it
    lines = result.lines()
    assert any("4 -> 3 experts" in line for line in lines)
    if architecture == "qwen3_moe":  # its middle layer is dense
        assert record.layers[1].groups == {} and "layer   1  unchanged" not in lines
        assert any("1 layers have no experts" in note for note in record.notes)


def test_what_cannot_be_pruned_is_one_line(
    tmp_path: Path, options: Callable[..., PruneOptions]
) -> None:
    mixtral, llama = load_tiny(tmp_path, "mixtral").config, load_tiny(tmp_path, "llama").config
    grouped = load_tiny(tmp_path, "deepseek_v3").config
    for config, changes, message, hint in (
        (mixtral, {"ratio": 0.3}, "--method taylor: of a mixture", "--method reap"),
        (mixtral, {"layers": "0"}, "--layers: of a mixture", "--method reap"),
        (mixtral, {"method": "reap", "ratio": 0.3, "mlp": False}, "--no-mlp: of a mix", "reap"),
        (mixtral, {"method": "reap", "ratio": 0.1}, "removes none of 4 experts", "larger"),
        (mixtral, {"experts": 1}, "--experts 1 is not possible: the model has 4", "2, 3"),
        (mixtral, {"method": "reap", "target_params": 1000}, "a token needs 2", "larger target"),
        (grouped, {"experts": 7}, "--experts 7 is not possible: the model has 8", "6, 8"),
        (llama, {"method": "reap", "ratio": 0.3}, "--method reap: the model is no mixture", ""),
        (llama, {"experts": 2}, "--experts: the model is no mixture", ""),
    ):
        with pytest.raises(SlimError, match=message) as caught:
            plan(config, options(**changes), 4)
        assert hint in caught.value.hint


def test_a_target_leaves_as_many_experts_as_it_allows(tmp_path: Path) -> None:
    config = load_tiny(tmp_path, "mixtral").config
    counts = count(build(config), mixture_of(config))
    expert = sum(counts.groups[EXPERTS])
    planned = plan(config, PruneOptions(method="reap", target_params=counts.total - 1), 2)
    assert planned.parameters == counts.total - expert
    assert planned.sizes == {EXPERTS: [3, 3, 3]}
    planned = plan(config, PruneOptions(method="reap", target_bytes=2 * (counts.total - expert)), 2)
    assert planned.sizes == {EXPERTS: [3, 3, 3]}
    assert "experts    4 -> 3 a layer" in planned.lines()


def test_every_mixture_of_the_tests_is_one() -> None:
    for name, config in MIXTURES.items():
        mixture = mixture_of(config)
        assert mixture is not None, name
        weights = dict(tree_flatten(build(config).parameters()))
        for layer, family in enumerate(mixture.families):
            for path, axis in family.members if family else ():
                assert weights[f"model.layers.{layer}.{path}"].shape[axis] == mixture.count
