"""Rows that share their beginnings have the loss and the gradients of rows side by side."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.data.collate import Batch, collate, to_the_end
from mlx_slim.data.shared import cheapest, cost, list_rows
from mlx_slim.models import structure
from mlx_slim.models.build import build
from mlx_slim.models.prefix_attention import why_not
from mlx_slim.runtime import to_float
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.grad_checkpoint import checkpointed
from mlx_slim.training.optim import trainable
from mlx_slim.training.step import Stepper
from mlx_slim.training.step_result import StepResult
from tests.support.rows import MemoryRows
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels

# Rows as beginnings: each letter is a run of tokens, the same wherever it stands.
RUNS = {letter: 5 + 3 * number for number, letter in enumerate("abcdefgh")}
ROWS = {
    "one beginning": ["ab", "ac", "ad", "ae"],
    "nested": ["abc", "abd", "abe", "af", "ag", "h"],
    "none": ["a", "b", "c", "d"],
    "a row that begins another": ["a", "ab", "abc", "ad"],
    "rows twice": ["ab", "ab", "ac"],
    "one row": ["abc"],
}


class BegunRows(MemoryRows):
    """Rows of runs; the second half of each is supervised, or all of it."""

    def __init__(
        self, rows: list[str], *, everything: bool = False, weighted: bool = False
    ) -> None:
        super().__init__([sum(RUNS[letter] for letter in row) for row in rows])
        rng = np.random.default_rng(7)
        runs = {
            letter: rng.integers(0, 256, size).astype(np.int32) for letter, size in RUNS.items()
        }
        for number, row in enumerate(rows):
            ids = np.concatenate([runs[letter] for letter in row])
            supervised = self._rows[number][1]
            if everything:
                supervised = np.arange(len(ids)) > 0
            self._rows[number] = ids, supervised
        self.supervised = np.array([int(s.sum()) for _, s in self._rows], dtype=np.int64)
        self._weighted = weighted

    def weights(self, i: int) -> np.ndarray | None:
        return np.linspace(0.5, 2, self.lengths[i], dtype=np.float32) if self._weighted else None


def batch_of(name: str, **kind: bool) -> Batch:
    rows = BegunRows(ROWS[name], **kind)
    return collate(rows, [[i] for i in range(len(rows))], isolate=False)


def step(model: object, *batches: Batch) -> StepResult:
    return Stepper(model, CrossEntropy(model, chunk=16)).step(batches)  # type: ignore[arg-type]


def apart(ours: StepResult, plain: StepResult) -> float:
    """The largest difference of any gradient, as a fraction of the largest gradient."""
    assert ours.supervised == plain.supervised
    assert ours.loss == pytest.approx(plain.loss, rel=1e-6)
    largest = max(to_float(mx.abs(value).max()) for value in plain.gradients.values())
    gaps = (mx.abs(ours.gradients[path] - value).max() for path, value in plain.gradients.items())
    return max(map(to_float, gaps)) / largest


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("architecture", ["llama", "phi", "qwen3", "mixtral"])
def test_loss_and_gradients_are_those_of_rows_side_by_side(
    tiny: TinyModels, architecture: str, name: str
) -> None:
    model, _ = stock_load(str(tiny(architecture)))
    batch = batch_of(name)
    shared = [shards for shards in list_rows(batch, (1, 2)) if shards]
    plain = step(model, batch)
    for shards in shared:
        assert apart(step(model, *shards), plain) < 2e-5


@pytest.mark.parametrize("kind", ["everything", "weighted"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_it_holds_for_whole_rows_weighted_turns_and_recomputed_blocks(
    tiny: TinyModels, kind: str, checkpoint: bool
) -> None:
    model, _ = stock_load(str(tiny("llama")))
    batch = batch_of("nested", **{kind: True})
    with checkpointed(structure.blocks(model), checkpoint):
        (shards,) = list_rows(batch)
        assert apart(step(model, *shards), step(model, batch)) < 2e-5


def test_every_distinct_beginning_is_computed_once() -> None:
    (shards,) = list_rows(batch_of("nested", everything=True))
    sizes = sum(RUNS[letter] for letter in "abcdefgh")
    leaves = 6  # the last id of a row is a target only
    assert shards[0].computed_tokens == sizes - leaves
    assert shards[0].rows == 6 and shards[0].real_tokens == batch_of("nested").real_tokens


def test_sharing_is_chosen_where_it_takes_less_time_and_no_more_memory() -> None:
    plain = batch_of("none")
    assert cheapest(plain, [plain], 1)[0].nodes  # without padding
    alike = collate(MemoryRows([20] * 4), [[i] for i in range(4)], isolate=False)
    assert cheapest(alike, [alike], 1)[0] is alike
    rows = BegunRows(["ha", "hb", "hc", "hd"] * 2)
    batch = collate(rows, [[i] for i in range(8)], isolate=False)
    shards = batch.shards(4)
    shared = cheapest(batch, shards, 2)
    assert len(shared) < len(shards) and all(shard.nodes for shard in shared)
    assert sum(map(cost, shared)) < 0.7 * sum(map(cost, shards))
    measuring = to_the_end(collate(rows, [[0]] * 8, isolate=False))
    assert cheapest(measuring, [measuring], 1)[0] is measuring


def test_a_stepper_shares_what_pays_and_counts_it(tiny: TinyModels) -> None:
    model, _ = stock_load(str(tiny("llama")))
    batch = batch_of("nested")
    objective = CrossEntropy(model, chunk=16)
    plain = Stepper(model, objective).step([batch])
    shared = Stepper(model, objective, prefix_sharing=True).step([batch])
    threads = Stepper(model, objective, prefix_sharing=True, num_threads=2).step([batch])
    assert shared.computed < plain.computed and shared.tokens == plain.tokens
    assert apart(shared, plain) < 2e-5 and apart(threads, plain) < 2e-5
    again = Stepper(model, objective, prefix_sharing=True).step([batch])
    assert again.loss == shared.loss
    assert all(
        mx.array_equal(again.gradients[path], shared.gradients[path]) for path in trainable(model)
    )


def test_memory_falls(tiny: TinyModels) -> None:
    model, _ = stock_load(str(tiny("llama")))
    model.freeze()
    model.model.layers[0].self_attn.q_proj.unfreeze()
    rows = BegunRows(["hgfedc" + letter for letter in "abab"])
    batch = collate(rows, [[i] for i in range(4)], isolate=False)
    peaks = []
    for sharing in (False, True):
        stepper = Stepper(model, CrossEntropy(model, chunk=16), prefix_sharing=sharing)
        mx.reset_peak_memory()
        stepper.micro(batch)
        peaks.append(mx.get_peak_memory())
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize(
    ("architecture", "longest", "reason"),
    [
        ("llama", 500, ""),
        ("mixtral", 500, ""),
        ("gemma3_text", 500, "window"),
        ("gpt_oss", 500, "attention"),
        ("deepseek_v3", 500, "mask of its own"),
    ],
)
def test_models_that_cannot_share_say_why(
    tiny: TinyModels, architecture: str, longest: int, reason: str
) -> None:
    model, _ = stock_load(str(tiny(architecture)))
    why = why_not(model, longest)
    assert (reason in why) if reason else why == ""


def test_a_recurrent_model_cannot_share() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    mamba = {"model_type": "mamba", "state_size": 4, "conv_kernel": 4, "use_bias": False}
    model = build({**mamba, **sizes, "use_conv_bias": True, "time_step_rank": 4})
    assert "attend" in why_not(model, 30)
