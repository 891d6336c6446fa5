"""Distillation from logits across tokenizers on tiny models: learned, resumed, refused, counted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim import events
from mlx_slim.artifacts import load_tensors
from mlx_slim.config.load import Resolved, from_values
from mlx_slim.data.batches import Batcher, collate
from mlx_slim.data.shapes import SHAPES
from mlx_slim.data.shared import list_rows
from mlx_slim.distillation.run import distill
from mlx_slim.distillation.uld import ULDDistillation
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.prefix_attention import why_not
from mlx_slim.runtime import to_float
from mlx_slim.training.objective import Objective
from mlx_slim.training.step import Stepper
from tests.support.runs import Recorder, losses, recipe, run_until_killed
from tests.support.vocabularies import student_of_words, teacher_of_words, write_conversations

Pair = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A student, a teacher that has learned the rows, and the rows."""
    folder = tmp_path_factory.mktemp("pair")
    rows = write_conversations(folder / "rows.jsonl", 5)
    start = teacher_of_words(folder / "start")
    steps = {"steps": 30, "learning_rate": 5e-3, "save_every": 100, "validate_every": 100}
    finetune(recipe(start, rows, "full", **steps), folder / "run", observer=Recorder())
    return student_of_words(folder / "student"), folder / "run" / "model", rows


def resolved_run(
    pair: Pair, method: str = "lora", train: dict[str, Any] | None = None, **distillation: Any
) -> Resolved:
    """Return the small recipe with a teacher of another tokenizer."""
    student, teacher, rows = pair
    plain = recipe(student, rows, method, **(train or {}))
    values = plain.recipe.model_dump(exclude={"distill"}, exclude_unset=True)
    distill_values = {"teachers": [{"model": str(teacher)}], "method": "uld", "top_k": 16}
    return from_values({**values, "distill": {**distill_values, **distillation}}, "small", "test")


def notices(recorder: Recorder) -> list[str]:
    return [event.message for event in recorder.events if isinstance(event, events.Notice)]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_student_comes_nearer_to_a_teacher_with_other_tokens(
    pair: Pair, tmp_path: Path, method: str
) -> None:
    """At equal steps: distance of held-out rows, against cross-entropy alone."""
    train = {"steps": 30, "learning_rate": 1e-2, "validate_every": 30, "save_every": 30}
    apart = {}
    for weight in (0.0, 1.0):
        out = tmp_path / f"{weight}"
        distill(resolved_run(pair, method, train, weight=weight), out, observer=Recorder())
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        (last,) = [line for line in lines if line["event"] == "validation"]
        apart[weight] = last["parts"]["divergence"]
        assert last["loss"] > 0
    assert apart[1.0] < 0.85 * apart[0.0]
    record = json.loads((out / "run.json").read_text())["distill"]
    assert record["method"] == "uld"
    assert record["cache_bytes"] == sum(f.stat().st_size for f in out.glob("targets/*/*.bin"))
    assert record["teachers"][0]["rows"] == 25
    assert record["teachers"][0]["unaligned"] == {}


def test_weight_zero_is_plain_fine_tuning_bit_for_bit(pair: Pair, tmp_path: Path) -> None:
    student, _, rows = pair
    finetune(recipe(student, rows), tmp_path / "plain", observer=Recorder())
    distill(resolved_run(pair, weight=0), tmp_path / "ours", observer=Recorder())
    assert losses(tmp_path / "ours") == losses(tmp_path / "plain")


def _objective(
    run: Resolved, out: Path, chunk: int | None = None
) -> tuple[ULDDistillation, Any, Any, Objective]:
    """Return the strategy, the tuned model, its rows and the objective, targets generated."""
    settings = run.recipe
    assert settings.distill is not None
    strategy = ULDDistillation(settings.distill, settings.distill.teachers)
    strategy.check(settings)
    tuned = strategy.student.prepare(settings)
    data = strategy.rows(settings, tuned, out, unchanged=False)
    assert strategy.targets.generate(Recorder())
    vocabulary = tuned.config["vocab_size"]
    return strategy, tuned, data, strategy.objectives(tuned.model, chunk, vocabulary, 1)[0]


@pytest.mark.parametrize("uld", [{}, {"merge": "bayesian", "hybrid": True}])
def test_batches_of_every_kind_give_one_gradient(
    pair: Pair, tmp_path: Path, uld: dict[str, Any]
) -> None:
    """Packed, of few shapes, with shared beginnings and in chunks: all equal row by row."""
    run = resolved_run(pair, "full", uld=uld, divergence="jsd" if uld else "forward")
    strategy, tuned, data, objective = _objective(run, tmp_path, chunk=3)
    rows = list(range(len(data.train)))
    assert not why_not(tuned.model, 128)

    def sums_of(batches: list[Any]) -> tuple[mx.array, dict[str, mx.array]]:
        total, gradients = mx.zeros(3), {}
        for batch in batches:
            sums, values = Stepper(tuned.model, objective).micro(batch)
            total = total + sums
            for path, value in values.items():
                gradients[path] = gradients.get(path, 0) + value
        mx.eval(total, gradients)
        return total, gradients

    expected = sums_of([collate(data.train, [[row]], isolate=False) for row in rows])
    assert to_float(expected[0][2]) > 0
    side_by_side = collate(data.train, [[row] for row in rows], isolate=False)
    packer = Batcher(data.train, 256, 128, "packed", 0)
    shaped = Batcher(data.train, 256, 128, "grouped", 0, limit=SHAPES // 8)
    whole = strategy.objectives(tuned.model, None, tuned.config["vocab_size"], 1)[0]
    largest = max(to_float(mx.abs(value).max()) for value in expected[1].values())
    for name, batches in {
        "side by side": [side_by_side],
        "packed": [packer.batch(groups) for groups in packer.plan(0)],
        "few shapes": [shaped.batch(groups) for groups in shaped.plan(0)],
        "shared": list_rows(side_by_side)[0],
        "one chunk": [side_by_side],
    }.items():
        objective = whole if name == "one chunk" else objective
        sums, gradients = sums_of(batches)
        assert mx.allclose(sums, expected[0], rtol=1e-4), name
        for path, value in gradients.items():
            assert to_float(mx.abs(value - expected[1][path]).max()) < 1e-4 * largest, (name, path)


def test_a_batch_of_a_fixed_shape_has_arrays_of_fixed_shapes(pair: Pair, tmp_path: Path) -> None:
    """A compiled step is traced once a shape, whichever rows and groups are inside."""
    _, _, data, objective = _objective(resolved_run(pair), tmp_path)
    batcher = Batcher(data.train, 256, 128, "grouped", 0, limit=4)
    shapes: dict[tuple[int, ...], set[Any]] = {}
    batches = [batcher.batch(groups) for epoch in (0, 1) for groups in batcher.plan(epoch)]
    for batch in [*batches, batcher.largest_batch()]:
        arrays = objective.arrays(batch)
        key = (*batch.tokens_BT.shape, len(batch.targets_N))
        seen = tuple(None if array is None else tuple(array.shape) for array in arrays)
        shapes.setdefault(key, set()).add(seen)
    assert all(len(seen) == 1 for seen in shapes.values())


KILL_SCRIPT = """
import os, signal, sys
from pathlib import Path
from mlx_slim.distillation import target_cache, uld_rows
from mlx_slim.distillation.run import distill
from tests.distillation.test_uld import resolved_run

student, data, teacher, out, moment, count, resume = sys.argv[1:8]
asked = []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Observer:
    def notify(self, event):
        if moment == "step" and event.name == "step" and event.step == int(count):
            die()

def counted(function):
    def called(*args, **kwargs):
        asked.append(1)
        if len(asked) == int(count):
            die()
        return function(*args, **kwargs)
    return called

if moment == "align":
    uld_rows.groups = counted(uld_rows.groups)
if moment == "cache":
    target_cache._put = counted(target_cache._put)
run = resolved_run((Path(student), Path(teacher), Path(data)))
distill(run, Path(out), observer=Observer(), resume=resume == "1")
"""


def test_killed_while_aligning_asking_and_learning_equals_uninterrupted(
    pair: Pair, tmp_path: Path
) -> None:
    student, teacher, rows = pair
    straight, out = tmp_path / "straight", tmp_path / "killed"
    distill(resolved_run(pair), straight, observer=Recorder())
    moments = [("align", 9), ("cache", 3), ("step", 5)]
    for number, (moment, count) in enumerate(moments):
        run_until_killed(KILL_SCRIPT, student, rows, teacher, out, moment, count, int(number > 1))
        assert len(list(out.glob("alignment/*/alignment.json"))) == (moment != "align")
    distill(resolved_run(pair), out, observer=Recorder(), resume=True)
    assert losses(out) == losses(straight)
    for file in (straight / "adapters").glob("*.safetensors"):
        ours, theirs = load_tensors(file), load_tensors(out / "adapters" / file.name)
        assert all(mx.array_equal(ours[key], theirs[key]).item() for key in ours)


def test_ctrl_c_keeps_the_targets_so_far(pair: Pair, tmp_path: Path) -> None:
    class CtrlC(Recorder):
        def notify(self, event: events.Event) -> None:
            super().notify(event)
            if isinstance(event, events.Notice) and "16 logits each" in event.message:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="while targets were computed"):
        distill(resolved_run(pair), tmp_path / "run", observer=CtrlC())
    distill(resolved_run(pair), tmp_path / "run", observer=Recorder(), resume=True)
    assert sorted(losses(tmp_path / "run")) == list(range(1, 11))


def _change_template(folder: Path, change: str) -> None:
    """Let a model's chat template change answers."""
    jinja = folder / "chat_template.jinja"
    file = jinja if jinja.is_file() else folder / "tokenizer_config.json"
    text = file.read_text()
    before = "message['content'] }}</s>"
    assert before in text
    file.write_text(text.replace(before, f"message['content'] {change} }}}}</s>"))


def test_rows_that_cannot_be_aligned_are_counted_and_still_learned_from(
    pair: Pair, tmp_path: Path
) -> None:
    student, teacher, rows = pair
    changing = tmp_path / "changing"
    shutil.copytree(teacher, changing)
    _change_template(changing, "| replace('hi', 'HI')")
    recorder, out = Recorder(), tmp_path / "run"
    distill(resolved_run((student, changing, rows)), out, observer=recorder)
    text = [one for one in notices(recorder) if "cannot be aligned" in one]
    assert len(text) == 1
    assert "5 of 25 rows cannot be aligned and have cross-entropy alone" in text[0]
    (entry,) = json.loads((out / "run.json").read_text())["distill"]["teachers"]
    ((reason, counted),) = entry["unaligned"].items()
    assert reason == "the teacher's template changes an answer's text"
    assert counted["count"] == 5
    assert counted["first"][0].endswith("rows.jsonl, line 5")


def test_two_teachers_count_by_weight(pair: Pair, tmp_path: Path) -> None:
    _, teacher, _ = pair
    other = teacher_of_words(tmp_path / "other", seed=5)
    first = {}
    for name, teachers in {
        "a": [{"model": str(teacher)}],
        "b": [{"model": str(other)}],
        "both": [{"model": str(teacher), "weight": 3}, {"model": str(other), "weight": 1}],
    }.items():
        run = resolved_run(pair, "full", {"steps": 1}, weight=1, teachers=teachers)
        distill(run, tmp_path / name, observer=Recorder())
        first[name] = losses(tmp_path / name)[1]
    assert first["both"] == pytest.approx(0.75 * first["a"] + 0.25 * first["b"], rel=1e-5)


def test_equal_models_are_not_apart(pair: Pair, tmp_path: Path) -> None:
    student, _, rows = pair
    run = resolved_run((student, student, rows), "full", {"steps": 1}, weight=1, top_k="all")
    distill(run, tmp_path / "run", observer=Recorder())
    assert abs(losses(tmp_path / "run")[1]) < 1e-4


def test_what_cannot_be_done_is_one_line_and_leaves_no_folder(pair: Pair, tmp_path: Path) -> None:
    student, _, rows = pair
    out = tmp_path / "run"
    endpoint = [{"base_url": "http://127.0.0.1:1/v1", "model": "far"}]
    with pytest.raises(SlimError, match="needs a teacher's logits: far is an endpoint"):
        distill(resolved_run(pair, teachers=endpoint), out, observer=Recorder())
    assert not out.exists()
    shouting = teacher_of_words(tmp_path / "shouting")
    _change_template(shouting, "| upper")
    with pytest.raises(SlimError, match="no training row can be aligned") as caught:
        distill(resolved_run((student, shouting, rows)), out, observer=Recorder())
    assert "the teacher's template changes an answer's text" in caught.value.message
    assert not out.exists()


def test_rows_cut_on_either_side_are_aligned_where_they_are_left(
    pair: Pair, tmp_path: Path
) -> None:
    groups = {}
    for policy in ("drop", "left", "right"):
        run = resolved_run(pair, train={"max_length": 40 if policy != "drop" else 128})
        settings = run.recipe.model_copy(
            update={"data": run.recipe.data.model_copy(update={"truncation": policy})}
        )
        assert settings.distill is not None
        strategy = ULDDistillation(settings.distill, settings.distill.teachers)
        strategy.check(settings)
        tuned = strategy.student.prepare(settings)
        strategy.rows(settings, tuned, tmp_path / policy, unchanged=False)
        (teacher,) = strategy.targets.teachers
        groups[policy] = sum(one.shape.targets for one in teacher.sets)
    assert 0 < groups["right"] < groups["drop"]
    assert 0 < groups["left"] < groups["drop"]
