"""Configurations of ``mlx_lm.lora`` as recipes: keys, defaults, differences, refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mlx_lm.lora import CONFIG_DEFAULTS

from mlx_slim.cli.main import run
from mlx_slim.config.load import load_recipe
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.mlx_lm_config import Translation, read_mlx_lm
from mlx_slim.finetuning.mlx_lm_file import DEFAULTS, LORA
from tests.support.runs import losses, write_rows
from tests.support.tiny import TinyModels

# As the example of mlx-lm has it (mlx_lm/examples/lora_config.yaml).
EXAMPLE = """
model: "mlx_model"
train: true
fine_tune_type: lora
optimizer: adamw
data: "DATA"
seed: 0
num_layers: 2
batch_size: 4
iters: 12
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 256
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 3
  warmup_init: 1e-7
  arguments: [1e-3, 12, 1e-4]
"""


def read(tmp_path: Path, text: str) -> Translation:
    file = tmp_path / "lora_config.yaml"
    file.write_text(text)
    return read_mlx_lm(file)[2]


def test_the_defaults_are_those_of_the_installed_mlx_lm() -> None:
    theirs = {**CONFIG_DEFAULTS, "optimizer_config": {}, "lora_parameters": {}}
    ours = {key: value for key, value in DEFAULTS.items() if not key.endswith("_feature")}
    assert theirs.items() <= ours.items()
    assert ours.keys() - theirs.keys() == {"hf_dataset"}
    assert CONFIG_DEFAULTS["lora_parameters"].items() <= LORA.items()


def test_the_example_becomes_a_recipe_that_runs(tiny: TinyModels, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", 24)
    write_rows(data / "valid.jsonl", 4)
    text = EXAMPLE.replace("DATA", str(data)).replace("mlx_model", str(tiny("llama")))
    source, target = tmp_path / "lora_config.yaml", tmp_path / "mine.yaml"
    source.write_text(text)
    assert run(["recipes", "--from-mlx-lm", str(source), "-o", str(target)]) == 0
    recipe = load_recipe(str(target)).recipe
    assert recipe == read_mlx_lm(source)[0]
    assert (recipe.adapter.scale, recipe.adapter.resolved_alpha) == (20, 160)
    assert recipe.adapter.targets == ["self_attn.q_proj", "self_attn.v_proj"]
    assert recipe.adapter.layers == 2
    train = recipe.train
    assert (train.steps, train.warmup, train.schedule, train.min_lr_ratio) == (12, 3, "cosine", 0.1)
    assert (train.learning_rate, train.weight_decay, train.clip) == (1e-3, 0.01, 0)
    assert train.decay_all  # as mlx's AdamW
    assert train.batch_tokens == 256  # four rows of about 50 tokens, and the longest row
    assert recipe.data.validation == str(data) and not recipe.data.mask_prompt
    words = ["train", str(target), "train.steps=2", "train.log_every=1", "-o", str(tmp_path / "r")]
    assert run([*words, "--quiet"]) == 0
    assert len(losses(tmp_path / "r")) == 2


def test_what_differs_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "train: true\nmodel: owner/name\ndata: owner/rows\ngrad_accumulation_steps: 4\n"
        "optimizer: adam\nlr_schedule: {name: step_decay, arguments: [1e-4, 0.9, 10]}\n"
        "project_name: p\nreport_to: wandb,swanlab\nadapter_path: there\n"
    )
    assert run(["recipes", "--from-mlx-lm", str(file), "-o", str(tmp_path / "mine.yaml")]) == 0
    out = capsys.readouterr().out
    for text in ("scale: mlx-lm's 20", "bias correction: mlx-lm's adam has none", "step_decay"):
        assert f"differs: {text}" in out or f"differs: lr_schedule {text}" in out
    assert "differs: batches: mlx-lm's have 4 rows" in out
    assert "differs: accumulation:" in out
    absent = set(re.findall(r"^no counterpart: (\w+)", out, re.M))
    assert absent == {"project_name", "report_to", "adapter_path"}
    recipe = load_recipe(str(tmp_path / "mine.yaml")).recipe
    assert (recipe.train.steps, recipe.train.validate_every) == (250, 50)
    assert recipe.train.batch_tokens == 4 * 2048 and recipe.report_to == ["wandb"]
    assert recipe.adapter.layers == 16 and recipe.train.optimizer == "adam"


def test_methods_and_data_of_the_hub(tmp_path: Path) -> None:
    full = read(tmp_path, "train: true\nfine_tune_type: full\nnum_layers: 4\n")
    assert "adapter" not in full.values and any("last 4 blocks" in d for d in full.differences)
    every = read(tmp_path, "train: true\nnum_layers: -1\nmask_prompt: true\n")
    assert every.values["adapter"]["layers"] == "all"
    assert every.values["data"]["learn"] == "last"
    hub = "hf_dataset: {path: billsum, train_split: 'train[:1000]', prompt_feature: text, "
    hub += "completion_feature: summary}\n"
    data = read(tmp_path, f"train: true\n{hub}").values["data"]
    assert data["path"] == [{"path": "billsum", "split": "train[:1000]"}]
    assert data["columns"] == {"prompt": "text", "completion": "summary"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iter: 3", "line 1: iter is not a key of mlx_lm.lora .did you mean 'iters'"),
        ("model: a\nlora_parameters: {alpha: 16}", "line 2: lora_parameters.alpha .*scale instead"),
        ("lora_parameters: {ranks: 16}", "lora_parameters.ranks .*did you mean 'rank'"),
        ("optimizer: lion", "optimizer is 'lion', expected one of adam"),
        ("batch_size: four", "batch_size is 'four', expected a whole number from 1"),
        ("fine_tune_type: dpo", "fine_tune_type is 'dpo', expected lora, dora or full"),
        ("lr_schedule: {name: cosine, arguments: [1e-4]}", "name is 'cosine', .*mlx.optimizers"),
        ("lr_schedule: {name: cosine_decay}", "arguments is None, expected a list of numbers"),
        ("- a", "holds a list"),
        ("lora_layers: 16", "lora_layers is not a key of mlx_lm.lora .mlx-lm calls it num_layers"),
        ("use_dora: true", "use_dora is not a key .*has fine_tune_type: dora"),
        (
            "lr_schedule: {name: linear_schedule, arguments: [0.0, 1e-5, 100]}",
            r"arguments is \[0.0, 1e-05, 100\], .*the rate, above 0 .*lr_schedule.warmup: STEPS",
        ),
        (
            "lr_schedule: {name: cosine_decay, arguments: [1e-4]}",
            "expected the rate and the steps of its decay",
        ),
    ],
)
def test_what_mlx_lm_does_not_have_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SlimError, match=message):
        read(tmp_path, text)


def test_two_recipes_at_once_and_an_existing_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train: true\n")
    assert run(["recipes", "smollm2-lora", "--from-mlx-lm", str(file)]) == 2
    assert run(["recipes", "--from-mlx-lm", str(file), "-o", str(file)]) == 2
    assert run(["recipes", "--from-mlx-lm", str(tmp_path / "absent.yaml")]) == 2


def test_short_rows_fill_a_step_with_as_many_as_mlx_lms_where_they_can(tmp_path: Path) -> None:
    """A micro-batch holds the longest row: it is accumulated less often, or the rows are told."""
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", 24)  # of about 50 tokens
    text = f"train: true\nmodel: m\ndata: {data}\nmax_seq_length: 400\nbatch_size: 2\n"
    eight = read(tmp_path, text + "grad_accumulation_steps: 8\n")
    train = eight.values["train"]
    assert train["batch_tokens"] == 400 and train["accumulate"] == 2  # 16 rows of 50
    assert "of smaller batches" in eight.reasons["train.accumulate"]
    assert not any(line.startswith("rows of a step") for line in eight.differences)
    one = read(tmp_path, text)
    assert one.values["train"]["accumulate"] == 1
    assert "as large as the longest row" in one.reasons["train.batch_tokens"]
    (told,) = [line for line in one.differences if line.startswith("rows of a step")]
    assert re.search(r"about [789], mlx-lm's has 2, .* on [34].\d times the rows", told)
    long = read(tmp_path, text.replace("400", "64").replace("batch_size: 2", "batch_size: 4"))
    assert not any(line.startswith("rows of a step") for line in long.differences)
