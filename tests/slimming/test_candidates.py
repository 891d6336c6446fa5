"""What is listed meets the budget, is made as it is counted, and grows with the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_slim.errors import SlimError
from mlx_slim.models.load import read_config
from mlx_slim.pruning.run import prune
from mlx_slim.quantization.apply import parameter_bytes
from mlx_slim.slimming.candidate import Candidate, Cut
from mlx_slim.slimming.candidates import FLOOR, SearchSpace, budget, listed
from mlx_slim.slimming.cost import other_bytes
from mlx_slim.slimming.options import SlimOptions


@pytest.fixture
def space(tiny: Callable[..., Path]) -> SearchSpace:
    options = SlimOptions(context=256)
    return SearchSpace(read_config(tiny()), mx.float32, options, other_bytes(tiny()))


def test_every_candidate_meets_the_budget(space: SearchSpace) -> None:
    for options in (
        SlimOptions(disk=150_000),
        SlimOptions(memory=space.original.cost.memory_bytes - 400_000, context=256),
        SlimOptions(disk=300_000, speed=2.0),
    ):
        fitting = listed(space, options)
        fits = budget(options, space.original.cost)
        assert fitting and all(fits(one.cost) for one in fitting)
        least = FLOOR * space.original.cost.parameters
        assert all(one.cost.parameters >= least for one in fitting)
        assert len({one.key for one in fitting}) == len(fitting)


def test_more_bytes_never_give_less(space: SearchSpace) -> None:
    """The most parameters, and the most bits of an uncut model, grow with the budget."""
    most, bits = 0, 0
    for size in range(80_000, 600_000, 60_000):
        fitting = listed(space, SlimOptions(disk=size))
        whole = max(((one.bits or 32) for one in fitting if not one.cuts), default=0)
        largest = max(one.cost.parameters * (one.bits or 32) for one in fitting)
        if space.original.cost.disk_bytes > size:
            assert whole >= bits and largest >= 0.9 * most
        most, bits = max(most, largest), max(bits, whole)


def test_a_budget_that_nothing_meets_names_the_nearest(space: SearchSpace) -> None:
    with pytest.raises(SlimError, match=r"--disk 10\.0 kB: the nearest is 2 bits, 2 of 3 layers"):
        listed(space, SlimOptions(disk=10_000))


def test_the_nearest_to_a_memory_is_that_of_the_least_memory(tiny: Callable[..., Path]) -> None:
    """At long contexts it is the one of half the heads, which is not the smallest on disk."""
    options = SlimOptions(memory=10_000, context=100_000)
    space = SearchSpace(read_config(tiny()), mx.float32, options, other_bytes(tiny()))
    with pytest.raises(SlimError, match=r"the nearest is .*1 of 2 kv heads"):
        listed(space, options)


def test_without_a_budget_sizes_go_down(space: SearchSpace) -> None:
    fitting = listed(space, SlimOptions(keep=90))
    sizes = [one.cost.disk_bytes for one in fitting]
    assert sizes == sorted(sizes, reverse=True)
    assert {one.kind for one in fitting} >= {"bits", "depth", "width"}


def test_a_model_that_cannot_be_cut_still_has_bits(tiny: Callable[[str], Path]) -> None:
    config = {**read_config(tiny("llama")), "model_type": "olmo2"}
    space = SearchSpace(config, mx.float32, SlimOptions(), 0)
    assert {one.kind for one in listed(space, SlimOptions(disk=200_000))} == {
        "bits",
        "mixed",
    }


def test_cuts_are_made_as_they_are_counted(
    space: SearchSpace, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and looked at the dog. " * 60)
    total = space.original.cost.parameters
    for number, cut in enumerate((Cut("depth", layers=1), Cut("width", target=int(0.8 * total)))):
        options = cut.options(3, str(text), None)
        pruned = prune(tiny(), tmp_path / str(number), options)
        assert pruned.details.parameters_after == space.candidate(None, (cut,)).cost.parameters
    whole = space.candidate(8, ())
    assert whole.cost.weight_bytes < parameter_bytes_of(tiny())


def parameter_bytes_of(model: Path) -> int:
    from mlx_slim.models.load import load

    return parameter_bytes(load(model).model)


def test_candidates_are_read_as_they_were_written(space: SearchSpace) -> None:
    for one in listed(space, SlimOptions(disk=200_000)):
        assert Candidate.from_json(asdict(one)) == one
