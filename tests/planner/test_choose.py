"""A recipe for a model and rows: what is chosen, what stays, what fits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.config.layers import COMMAND_LINE
from mlx_slim.config.load import load_recipe
from mlx_slim.data.prepare import prepare
from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.planner import choose as module
from mlx_slim.planner.choose import Chosen, choose
from mlx_slim.planner.time import Machine
from mlx_slim.planner.work import Speed
from tests.support.runs import write_rows
from tests.support.tiny import ARCHITECTURES, TinyModels, byte_tokenizer


@pytest.fixture(autouse=True)
def one_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of which the speed does not depend on what else runs."""
    speed = Speed(flops=1e9, exponential=1e-8, element=1e-9)
    monkeypatch.setattr("mlx_slim.planner.choice_inputs.measure_speed", lambda dtype: speed)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which weights need most of the memory; they are not there, nothing reads them."""
    folder = tmp_path_factory.mktemp("wide") / "m"
    byte_tokenizer(folder)
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 32}
    (folder / "config.json").write_text(json.dumps({**ARCHITECTURES["llama"], **sizes}))
    return folder


def values(chosen: Chosen) -> dict[str, Any]:
    return {one.key: one.value for one in chosen.choices}


def test_every_choice_has_a_reason_and_the_file_gives_the_recipe(
    tiny: TinyModels, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 40)
    chosen = choose(str(tiny("llama")), str(data), out=tmp_path / "run")
    picked = values(chosen)
    assert picked["method"] == "lora" and picked["adapter.rank"] == 16
    assert picked["data.validation"] == 8 and picked["train.epochs"] == 3
    assert picked["train.max_length"] == 80  # the longest row has 79 tokens
    assert all(one.reason for one in chosen.choices)
    assert [*picked] == [key for key in module.ORDER if key in picked]
    assert not list(tmp_path.glob("run*"))
    file = tmp_path / "recipe.yaml"
    file.write_text(chosen.resolved.text)
    again = load_recipe(str(file))
    assert again.recipe == chosen.resolved.recipe
    for one in chosen.choices:
        assert f"# {one.reason}" in chosen.resolved.text
        assert chosen.resolved.origins[one.key] == one.reason
    assert again.origins["train.learning_rate"].startswith("recipe.yaml:")


def test_what_is_set_stays_and_the_rest_follows(tiny: TinyModels, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 40)
    words = ["train.max_length=50", "train.epochs=1", "adapter.scale=4", "data.validation=2"]
    chosen = choose(
        str(tiny("llama")), str(data), out=tmp_path / "run", method="full", overrides=words
    )
    recipe, picked = chosen.resolved.recipe, values(chosen)
    assert (recipe.method, recipe.train.max_length, recipe.train.epochs) == ("full", 50, 1)
    assert recipe.adapter.scale == 4 and "adapter.rank" not in picked  # full trains no adapter
    assert recipe.train.learning_rate == pytest.approx(7.4e-4)  # a tenth of an adapter's
    assert "dropped: " in chosen.choices[0].reason and "longer than 50" in chosen.choices[0].reason
    words = ["adapter.rank=4"]
    unused = choose(
        str(tiny("llama")), str(data), out=tmp_path / "run", method="full", overrides=words
    )
    (rank,) = [one for one in unused.choices if one.key == "adapter.rank"]
    assert rank.value == 4 and "method=full trains no adapter" in rank.reason
    by_user = {one.key for one in chosen.choices if one.reason == COMMAND_LINE}
    assert by_user == {"method", "train.max_length", "train.epochs", "data.validation"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overrides": ["data.path=x"]}, "data.path and --data set the same thing"),
        (
            {"method": "lora", "overrides": ["method=full"]},
            "method and --method set the same thing",
        ),
        ({"overrides": ["train.stpes=3"]}, "train.stpes .command line. is not a key"),
        ({"time": "soon"}, "time 'soon' is not a duration"),
        ({"time": "1h", "overrides": ["train.steps=3"]}, "--time and train.steps both limit"),
        ({"budget": "much"}, "'much' is not a memory size"),
        ({"time": "1s"}, "--time 1s is enough for 3 steps of .*, at least 10 are needed"),
    ],
)
def test_what_contradicts_itself_is_refused(
    tiny: TinyModels, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 40)
    with pytest.raises(SlimError, match=message):
        choose(str(tiny("llama")), str(data), out=tmp_path / "run", **arguments)


def test_memory_costs_time_first_then_bits_then_rows(wide: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 40)

    def at(budget: float) -> Chosen:
        return choose(str(wide), str(data), out=tmp_path / "run", budget=str(int(budget)))

    free = at(1e9)
    peak = free.prediction.predicted_peak_bytes
    weights = free.prediction.breakdown["weights"]
    assert values(free)["method"] == "lora" and "train.grad_checkpoint" not in values(free)
    slower = at(peak)  # a tenth is in reserve
    assert values(slower)["method"] == "lora"
    assert slower.prediction.predicted_peak_bytes * module.RESERVE <= peak
    assert (
        values(slower)["train.batch_tokens"] < values(free)["train.batch_tokens"]
        or (values(slower)["train.grad_checkpoint"])
    )
    eight = at(weights)
    assert (values(eight)["method"], values(eight)["quantize.bits"]) == ("qlora", 8)
    assert "lora needs" in eight.resolved.origins["method"]
    four = at(0.5 * weights)
    assert (values(four)["method"], values(four)["quantize.bits"]) == ("qlora", 4)
    assert four.prediction.predicted_peak_bytes <= 0.5 * weights
    assert four.resolved.recipe.memory.budget == int(0.5 * weights)  # of the guard, too
    fixed = choose(
        str(wide),
        str(data),
        out=tmp_path / "run",
        budget=str(weights),
        overrides=["quantize.bits=4"],
    )
    assert values(fixed)["quantize.bits"] == 4
    with pytest.raises(ResourceError, match="with a tenth in reserve"):
        at(0.1 * weights)
    with pytest.raises(ResourceError, match="needs at least"):  # lora, and no bits are given up
        choose(str(wide), str(data), out=tmp_path, method="lora", budget=str(weights))


def test_rows_are_dropped_only_when_nothing_else_fits(wide: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a" * 400, "completion": "b"}, *[{"prompt": "a", "completion": "b"}] * 60]
    data = tmp_path / "rows.jsonl"
    lines = (json.dumps({**row, "prompt": f"{i} {row['prompt']}"}) for i, row in enumerate(rows))
    data.write_text("\n".join(lines))
    words = ["data.validation=0"]
    free = choose(str(wide), str(data), out=tmp_path / "run", overrides=words)
    assert values(free)["train.max_length"] >= 400
    tight = choose(
        str(wide),
        str(data),
        out=tmp_path / "run",
        overrides=words,
        budget=str(int(0.45 * free.prediction.breakdown["weights"])),
    )
    assert values(tight)["train.max_length"] < 400
    assert "1 of 61 rows are longer than fits, and dropped" in tight.resolved.text


def test_time_shortens_the_run_and_counts_what_it_leaves_out(
    tiny: TinyModels, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 400)

    def within(time: str | None) -> Chosen:
        return choose(str(tiny("llama")), str(data), out=tmp_path / "run", time=time)

    whole = within(None)
    assert within("1d").resolved.recipe == whole.resolved.recipe  # enough changes nothing
    for fraction in (0.7, 0.15):
        limit = fraction * whole.time.high
        chosen = within(f"{limit:.3f}s")
        assert 0.5 * limit < chosen.time.high <= limit
    epochs = values(chosen)["train.epochs"]
    assert 0 < epochs < 1
    used = round(epochs * 360)
    reason = chosen.resolved.origins["train.epochs"]
    assert f"{used:,} rows are trained on once, {360 - used:,} are not" in reason


def test_time_counts_the_pass_of_the_teachers(tiny: TinyModels, tmp_path: Path) -> None:
    data, model = write_rows(tmp_path / "rows.jsonl", 100), str(tiny("llama"))

    def choice_of(*overrides: str) -> Chosen:
        words = ["distill.method=logits", "data.validation=0", *overrides]
        return choose(model, str(data), out=tmp_path / "run", overrides=words)

    teacher = {"model": model}
    once, twice = (choice_of(f"distill.teachers={json.dumps([teacher] * n)}") for n in (1, 2))
    a_pass = twice.time.high - once.time.high
    alone = once.prediction.predicted_seconds
    assert alone is not None and once.time.high == pytest.approx(alone + a_pass)
    # One forward pass over each row, a third of what training on it once takes.
    assert a_pass == pytest.approx(alone / values(once)["train.epochs"] / 3, rel=0.02)
    limit = 0.5 * once.time.high
    words = ["distill.method=logits", "data.validation=0"]
    words += [f"distill.teachers={json.dumps([teacher])}"]
    short = choose(model, str(data), out=tmp_path / "run", time=f"{limit:.3f}s", overrides=words)
    assert short.time.high <= limit


def test_a_quantized_model_stays_as_it_is(tiny: TinyModels, tmp_path: Path) -> None:
    from mlx_slim.config.schema import QuantizeConfig
    from mlx_slim.events import Broadcast
    from mlx_slim.quantization.run import CompressOptions, compress

    options = CompressOptions(quantize=QuantizeConfig(bits=8), fidelity_samples=0)
    compress(str(tiny("llama")), tmp_path / "q8", options, Broadcast([]))
    data = write_rows(tmp_path / "rows.jsonl", 40)
    chosen = choose(str(tmp_path / "q8"), str(data), out=tmp_path / "run")
    assert values(chosen)["method"] == "qlora" and "quantize.bits" not in values(chosen)
    assert "8-bit base" in chosen.resolved.origins["method"]
    with pytest.raises(SlimError, match="is quantized, and method=full"):
        choose(str(tmp_path / "q8"), str(data), out=tmp_path / "run", method="full")


def test_validation_rows_of_a_folder_are_used(tiny: TinyModels, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "train.jsonl", 40)
    alone = choose(str(tiny("llama")), str(folder), out=tmp_path / "run")
    assert values(alone)["data.validation"] == 8
    write_rows(folder / "valid.jsonl", 4)
    chosen = choose(str(tiny("llama")), str(folder), out=tmp_path / "run")
    assert values(chosen)["data.validation"] == str(folder)


def test_on_a_gpu_the_time_is_a_range_and_its_end_counts(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 400)
    machine = Machine("gpu", (1e9, 1e9), (0.2, 0.6), 0, None, "")
    monkeypatch.setattr("mlx_slim.planner.choice_inputs.on_gpu", lambda: True)
    monkeypatch.setattr("mlx_slim.planner.choice_inputs.this_machine", lambda dtype: machine)
    whole = choose(str(tiny("llama")), str(data), out=tmp_path / "run")
    assert whole.time.high == pytest.approx(3 * whole.time.low)
    assert " to " in whole.cost_line
    limit = 0.5 * whole.time.high
    chosen = choose(str(tiny("llama")), str(data), out=tmp_path / "run", time=f"{limit:.3f}s")
    assert 0.5 * limit < chosen.time.high <= limit


def test_rows_that_equal_a_validation_row_are_not_counted(tiny: TinyModels, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [json.dumps({"prompt": f"{i % 20}", "completion": "yes"}) + "\n" for i in range(40)]
    data.write_text("".join(rows))
    chosen = choose(str(tiny("llama")), str(data), out=tmp_path / "run")
    reason = chosen.resolved.origins["data.validation"]
    told = re.search(r"not trained on, nor are (\d) rows that equal one", reason)
    assert told
    prepared = prepare(
        chosen.resolved.recipe.data,
        chosen.tokenizer,
        max_length=chosen.resolved.recipe.train.max_length,
        seed=0,
        folder=tmp_path / "prepared",
    )
    key = "removed_from_train_as_duplicates_of_validation"
    assert prepared.ledger["split"][key] == int(told[1])
    trained = int(prepared.train.lengths.sum())
    epochs = chosen.resolved.recipe.train.epochs
    assert chosen.prediction.tokens == pytest.approx(epochs * trained, rel=0.01)


@pytest.mark.parametrize(("count", "why"), [(24, "no row differs"), (3, "3 rows are too few")])
def test_where_nothing_can_be_held_out_all_rows_train(
    tiny: TinyModels, tmp_path: Path, count: int, why: str
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * count)
    chosen = choose(str(tiny("llama")), str(data), out=tmp_path / "run")
    assert chosen.resolved.recipe.data.validation == 0
    assert chosen.resolved.origins["data.validation"].startswith(why)
    if count == 24:
        with pytest.raises(SlimError, match="no training row is left: all 20"):
            words = ["data.validation=4"]
            choose(str(tiny("llama")), str(data), out=tmp_path / "run", overrides=words)
