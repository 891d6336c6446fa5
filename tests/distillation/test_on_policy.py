"""On-policy distillation: what is learned from, in which memory, and that kills change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.artifacts import load_tensors
from mlx_slim.config.load import Resolved, from_values
from mlx_slim.distillation.run import distill
from mlx_slim.errors import SlimError
from mlx_slim.events import Notice, StepDone
from mlx_slim.finetuning import rounds
from mlx_slim.models.load import read_config
from mlx_slim.planner.memory import predict
from mlx_slim.planner.run import plan
from mlx_slim.round_events import RoundBegun
from tests.support.endpoint import serving
from tests.support.runs import Recorder, losses, recipe, run_until_killed, write_rows
from tests.support.scoring_server import ScoringServer
from tests.support.tiny import ARCHITECTURES, TinyModels, tiny_model

TURNS = "7500000"  # bytes: the student trains in 3.0 MB, the teacher's weights are 5 MB


def large_teacher(folder: Path) -> Path:
    return tiny_model(folder, seed=1, hidden_size=160, intermediate_size=640)


def small_recipe(
    student: Path, teacher: Path, data: Path, budget: str = "auto", **keys: Any
) -> Resolved:
    values = recipe(student, data, steps=6, batch_tokens=128).recipe.model_dump(exclude_unset=True)
    values["data"]["validation"] = 2
    values["distill"] = {"teachers": [{"model": str(teacher)}], "method": "on-policy", **keys}
    values["memory"] = {"budget": budget}
    if keys.get("on_policy_fraction") != 0:
        values["rounds"] = {"steps": 3, "max_tokens": 8}
    return from_values(values, "small", "test")


KILL_SCRIPT = """
import os, signal, sys
from pathlib import Path
from mlx_slim.distillation import target_cache
from mlx_slim.distillation.run import distill
from mlx_slim.finetuning import rounds
from mlx_slim.finetuning.round_answers import RoundFolder
from tests.distillation.test_on_policy import small_recipe

student, teacher, data, out, budget, moment, count, resume = sys.argv[1:9]
rounds.CHUNK = 2
seen = []

def reached(name):
    seen.append(name)
    if name == moment and seen.count(name) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)

class Observer:
    def notify(self, event):
        reached(event.name)

append, put = RoundFolder.append, target_cache._put
def appending(self, answers):
    append(self, answers)
    reached("chunk")
def putting(*args):
    put(*args)
    reached("target")
RoundFolder.append, target_cache._put = appending, putting
small = small_recipe(Path(student), Path(teacher), Path(data), budget, on_policy_fraction=0.8)
distill(small, Path(out), observer=Observer(), resume=resume == "1")
"""


def test_a_kill_while_it_writes_scores_or_trains_changes_nothing(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "CHUNK", 2)
    models = tiny(), large_teacher(tmp_path / "t")
    data = write_rows(tmp_path / "rows.jsonl")
    resolved = small_recipe(*models, data, TURNS, on_policy_fraction=0.8)
    straight, out = tmp_path / "straight", tmp_path / "out"
    distill(resolved, straight, observer=Recorder())
    # When the second process writes targets, those of the rows are there: they are the round's.
    for number, (moment, count) in enumerate([("chunk", 1), ("target", 2), ("step", 2)]):
        words = (*models, data, out, TURNS, moment, count, int(number > 0))
        run_until_killed(KILL_SCRIPT, *words)
    distill(resolved, out, observer=Recorder(), resume=True)
    assert losses(out) == losses(straight)
    file = Path("adapters") / "adapters.safetensors"
    ours, theirs = load_tensors(straight / file), load_tensors(out / file)
    assert all(mx.array_equal(ours[key], theirs[key]).item() for key in ours)


def test_a_fraction_of_0_is_distillation_from_rows_bit_for_bit(
    tiny: TinyModels, tmp_path: Path
) -> None:
    models = tiny(), large_teacher(tmp_path / "t")
    data = write_rows(tmp_path / "rows.jsonl")
    runs = []
    for keys in ({"method": "logits"}, {"on_policy_fraction": 0}):
        out = tmp_path / f"run{len(runs)}"
        keys = {"on_policy_fraction": None, **keys}
        values = small_recipe(*models, data, on_policy_fraction=0).recipe.model_dump(
            exclude_unset=True
        )
        values["distill"] |= keys
        distill(from_values(values, "small", "test"), out, observer=Recorder())
        runs.append((losses(out), load_tensors(out / "adapters" / "adapters.safetensors")))
        assert not (out / "rounds").exists()
    assert runs[0][0] == runs[1][0]
    assert all(mx.array_equal(value, runs[1][1][key]).item() for key, value in runs[0][1].items())


@pytest.mark.parametrize("divergence", ["jsd", "reverse"])
def test_on_answers_the_loss_is_the_divergence_alone(
    tiny: TinyModels, tmp_path: Path, divergence: str
) -> None:
    models = tiny(), large_teacher(tmp_path / "t")
    data, observer = write_rows(tmp_path / "rows.jsonl"), Recorder()
    keys = {"on_policy_fraction": 1, "divergence": divergence, "temperature": 2.0}
    distill(small_recipe(*models, data, **keys), tmp_path / "out", observer=observer)
    for event in observer.events:
        if isinstance(event, StepDone):
            assert event.metrics is not None
            assert event.loss == pytest.approx(4 * event.metrics["divergence"], rel=1e-6)
            assert event.text_age == (event.step - 1) % 3
    begun = [event for event in observer.events if isinstance(event, RoundBegun)]
    assert [event.step for event in begun] == [0, 3]
    for event in begun:
        folder = tmp_path / "out" / "rounds" / f"round-{event.round}"
        lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        assert event.answers == len(lines) > 0
        assert event.tokens == sum(len(line["ids"]) for line in lines)
        assert event.cut == sum(line["stop_reason"] == "length" for line in lines)
        assert event.writing_seconds > 0 and event.scoring_seconds > 0
    # No teacher reads training rows that nothing learns from: validation rows and two rounds.
    assert len(list((tmp_path / "out" / "targets").iterdir())) == 3


def test_where_both_do_not_fit_student_and_teacher_take_turns(
    tiny: TinyModels, tmp_path: Path
) -> None:
    models = tiny(), large_teacher(tmp_path / "t")
    data, runs = write_rows(tmp_path / "rows.jsonl"), []
    for budget in ("auto", TURNS):
        observer = Recorder()
        out = tmp_path / budget
        distill(small_recipe(*models, data, budget), out, observer=observer)
        texts = [event.message for event in observer.events if isinstance(event, Notice)]
        assert any("one model in memory at a time" in text for text in texts) == (budget == TURNS)
        assert any("teacher beside the student" in text for text in texts) == (budget == "auto")
        assert sum("is unloaded" in text for text in texts) == 1  # not once a round
        runs.append(losses(out))
    assert runs[0] == runs[1]


def test_an_endpoint_scores_rounds_as_a_local_teacher_and_may_fail_meanwhile(
    tiny: TinyModels, tmp_path: Path
) -> None:
    teacher, data = large_teacher(tmp_path / "t"), write_rows(tmp_path / "rows.jsonl")
    keys = {"on_policy_fraction": 0.8, "divergence": "jsd", "top_k": 16, "ask": {"retries": 0}}
    small = small_recipe(tiny(), teacher, data, **keys)
    distill(small, tmp_path / "local", observer=Recorder())
    server = ScoringServer(teacher)
    with serving(server) as served:
        far = small.recipe.model_dump(mode="json", exclude_unset=True)
        far["distill"]["teachers"] = [{"base_url": served.base_url, "model": "far"}]
        resolved = from_values(far, "small", "test")
        distill(resolved, tmp_path / "far", observer=Recorder())
        count = len(served.requests)
    assert losses(tmp_path / "far") == pytest.approx(losses(tmp_path / "local"), rel=1e-4)
    about = [json.loads(f.read_text()) for f in (tmp_path / "far").glob("targets/*/about.json")]
    assert {json.dumps(one["teacher"]) for one in about} == {
        json.dumps({"base_url": served.base_url, "model": "far"})
    }

    def dies(number: int, body: dict[str, Any]) -> Any:
        return server(number, body) if number < count - 3 else (500, {"error": "out of memory"}, {})

    out, port = tmp_path / "failed", int(served.base_url.split(":")[-1].removesuffix("/v1"))
    with serving(dies, port=port), pytest.raises(SlimError, match="500") as failed:
        distill(resolved, out, observer=Recorder())
    assert "saved" in failed.value.hint
    with serving(server, port=port) as served:
        distill(resolved, out, observer=Recorder(), resume=True)
        assert len(served.requests) < count
    assert losses(out) == losses(tmp_path / "far")


def test_models_whose_text_part_says_the_vocabulary(tmp_path: Path) -> None:
    """As those that see pictures: mistral3, gemma3."""
    folders = []
    for name in ("student", "teacher"):
        text = {**ARCHITECTURES["llama"], "model_type": "llama"}
        folder = tiny_model(tmp_path / name, model_type="mistral3", text_config=text)
        config = json.loads((folder / "config.json").read_text())
        part = {key: value for key, value in config.items() if key not in ARCHITECTURES["llama"]}
        part |= {"model_type": "mistral3", "tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(part))
        folders.append(folder)
    resolved = small_recipe(folders[0], folders[1], write_rows(tmp_path / "rows.jsonl"))
    values = resolved.recipe.model_dump(exclude_unset=True)
    for method in ("on-policy", "uld", "mutual"):
        values["distill"]["method"] = method
        if method != "on-policy":
            values.pop("rounds", None)
        values["train"] |= {"steps": 1}
        out = tmp_path / method
        distill(from_values(values, "small", "test"), out, observer=Recorder())
        assert (out / "run.json").is_file()


def test_a_plan_counts_the_teacher(tiny: TinyModels, tmp_path: Path) -> None:
    models = tiny(), large_teacher(tmp_path / "t")
    resolved = small_recipe(*models, write_rows(tmp_path / "rows.jsonl"))
    both, student = plan(resolved.recipe)[0], read_config(models[0])
    teachers = both.breakdown["teachers"]
    assert teachers > 4_000_000
    alone = predict(student, resolved.recipe, suggest=False)
    assert both.predicted_peak_bytes == alone.predicted_peak_bytes + teachers
    in_turns = plan(resolved.recipe, budget=TURNS)[0]
    # In turns each is alone: the student while it draws answers, the teacher with its pass.
    little = predict(student, resolved.recipe, budget=int(TURNS), suggest=False)
    assert little.predicted_peak_bytes < min(int(TURNS), alone.predicted_peak_bytes)
    largest = max(little.predicted_peak_bytes, int(1.1 * teachers))
    assert in_turns.predicted_peak_bytes == largest


def test_a_teacher_with_another_tokenizer_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "t")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    data = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(SlimError, match="has a different tokenizer") as caught:
        distill(small_recipe(tiny(), other, data), tmp_path / "out", observer=Recorder())
    assert "distill.method=sequence" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "logits", "on_policy_fraction": 0.5}, "on_policy_fraction=0.5 is for method"),
        ({"beta": 0.3}, "beta=0.3 is for divergence=jsd, not forward"),
        ({"method": "logits"}, "rounds says how the model answers prompts"),
        ({"on_policy_fraction": 1.5}, "on_policy_fraction"),
    ],
)
def test_keys_that_have_no_effect_are_refused(
    tiny: TinyModels, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(SlimError, match=message):
        small_recipe(tiny(), tiny(), tmp_path / "rows.jsonl", **keys)
