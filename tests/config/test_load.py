"""Recipes: layers, origins, and every way to get one wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_slim.config import library
from mlx_slim.config.load import Resolved, from_values, load_recipe, render
from mlx_slim.errors import SlimError


def write(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def run(text: str, *overrides: str) -> Resolved:
        return load_recipe(write(tmp_path, "r", text), overrides)

    return run


def test_later_layers_win_and_are_named(tmp_path: Path) -> None:
    write(tmp_path, "base", "model: a/base\ntrain: {clip: 2.0, epochs: 5}\n")
    write(tmp_path, "extra", "train:\n  seed: 7\n  clip: 3.0\n")
    top = write(tmp_path, "top", "extends: [base, extra]\nmethod: dora\ntrain:\n  seed: 8\n")
    resolved = load_recipe(top, ["train.epochs=2"])
    train = resolved.recipe.train
    assert (train.clip, train.epochs, train.seed, resolved.recipe.method) == (3.0, 2, 8, "dora")
    assert resolved.name == "top"
    assert resolved.origins["model"] == "base.yaml:1"
    assert resolved.origins["train.clip"] == "extra.yaml:3"
    assert resolved.origins["train.seed"] == "top.yaml:4"
    assert resolved.origins["train.epochs"] == "command line"
    assert resolved.origins["train.batch_tokens"] == "default"


def test_every_key_has_an_origin_and_a_line(load: Any) -> None:
    resolved = load("model: x\n")
    shown = render(resolved)
    for key, origin in resolved.origins.items():
        assert f"{key.rsplit('.')[-1]}: " in shown
        assert origin
    assert len({line.index("  # ") for line in shown.splitlines() if "  # " in line}) == 1


def test_lists_replace_and_mappings_merge(load: Any, tmp_path: Path) -> None:
    write(tmp_path, "p", "model: x\nadapter: {targets: [q_proj, v_proj]}\nreport_to: [wandb]\n")
    text = "extends: p\ndata: {columns: {prompt: q}}\nreport_to: [tensorboard]\n"
    recipe = load(text, "adapter.targets=[o_proj]", "data.columns.completion=a").recipe
    assert recipe.adapter.targets == ["o_proj"]
    assert recipe.report_to == ["tensorboard"]
    assert recipe.data.columns == {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("text", "override", "alpha", "scale"),
    [
        ("adapter: {scale: 20.0}", "adapter.alpha=16", 16.0, 2.0),
        ("adapter: {alpha: 16}", "adapter.scale=20", 160.0, 20.0),
        ("adapter: {alpha: 16}", "adapter.rank=16", 16.0, 1.0),
        ("adapter: {alpha: 16}", "adapter.scaling=rslora", 16.0, 16 / 8**0.5),
    ],
)
def test_the_later_of_alpha_and_scale_wins_and_both_are_shown(
    load: Any, text: str, override: str, alpha: float, scale: Any
) -> None:
    resolved = load(f"model: x\n{text}\n", override)
    assert resolved.recipe.adapter.resolved_alpha == pytest.approx(alpha)
    assert resolved.recipe.adapter.resolved_scale == pytest.approx(scale)
    lines = {
        line.split("#")[0].split(":")[0].strip(): line for line in render(resolved).splitlines()
    }
    assert f"{alpha:g}" in lines["alpha"]
    assert f"{scale:g}" in lines["scale"]


def test_the_later_of_steps_and_epochs_wins(load: Any) -> None:
    assert load("model: x\ntrain: {steps: 9}\n", "train.epochs=2").recipe.train.steps is None
    assert load("model: x\ntrain: {epochs: 9}\n", "train.steps=4").recipe.train.steps == 4


def test_both_in_one_file_is_an_error(load: Any) -> None:
    with pytest.raises(SlimError, match=r"alpha=16.* and scale=2.* are both set"):
        load("model: x\nadapter: {alpha: 16, scale: 2}\n")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=1e-5", "learning_rate", 1e-5),
        ("train.learning_rate=.5", "learning_rate", 0.5),
        ("train.steps=1_000", "steps", 1000),
        ("train.grad_checkpoint=true", "grad_checkpoint", True),
    ],
)
def test_numbers_are_read_as_people_write_them(
    load: Any, override: str, key: str, value: int | bool | float
) -> None:
    assert getattr(load("model: x\n", override).recipe.train, key) == value


def test_text_stays_text(load: Any) -> None:
    overrides = ["revision=0123456", "data.path=2024", "data.system=a: [b", "model=7"]
    recipe = load("model: x\n", *overrides).recipe
    assert (recipe.revision, recipe.data.path, recipe.model) == ("0123456", "2024", "7")
    assert recipe.data.system == "a: [b"
    assert load("model: no\n").recipe.model == "no"
    assert load("model: x\nrevision: 1e5\n", "revision=null").recipe.revision is None


def test_numbers_do_not_depend_on_what_others_did_to_yaml(load: Any) -> None:
    import mlx_lm.lora  # noqa: F401 (adds a resolver to yaml.SafeLoader)

    assert load("model: x\ntrain: {learning_rate: 1e-5}\n").recipe.train.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("key", "correction"),
    [
        ("forgeting.path", "'forgetting.path'"),  # not data.path, which ends alike
        ("held_outt.path", "'forgetting.path'"),  # the old name of the section
        ("quantize.awaer", "'quantize.qat'"),
        ("texts.path", "'data.path' or 'forgetting.path'"),  # two keys end so: both are named
    ],
)
def test_a_mistyped_section_is_corrected_before_its_keys(
    load: Any, key: str, correction: str
) -> None:
    with pytest.raises(SlimError) as refused:
        load("model: x\n", f"{key}=text.txt")
    assert refused.value.message.endswith(f"is not a key: did you mean {correction}?")


def test_all_problems_at_once_each_with_key_value_range_and_origin(load: Any) -> None:
    with pytest.raises(SlimError) as error:
        load(
            "model: x\nmehtod: lora\ntrain:\n  clip: -1\n  stpes: 3\nadapter: {rank: 0}\n",
            "train.warmup=soon",
            "trian.steps=3",
            "epochs=2",
            "train.batch_tokens=true",
            "data.path=[{path: a, weigth: 2}]",
            "nonsense",
            "train.learning_rate=.nan",
        )
    shown = str(error.value)
    assert "11 problems" in shown.splitlines()[0]
    assert len(shown.splitlines()) == 12
    for expected in (
        "mehtod (r.yaml:2) is not a key: did you mean 'method'?",
        "train.stpes (r.yaml:5) is not a key: did you mean 'train.steps'?",
        "train.clip (r.yaml:4) is -1: expected a number (at least 0 and at most 1e+09)",
        "adapter.rank (r.yaml:6) is 0: expected a whole number (at least 1 and at most 1e+09)",
        "train.warmup (command line) is 'soon': expected a number (at least 0 and at most 1e+09)",
        "trian.steps (command line) is not a key: did you mean 'train.steps'?",
        "epochs (command line) is not a key: did you mean 'train.epochs'?",
        "train.batch_tokens (command line) is true: "
        "expected a whole number (at least 8 and at most 1e+09)",
        "data.path.0.weigth (command line) is not a key: did you mean 'data.path.0.weight'?",
        "'nonsense' (command line) is not an override: write key=value",
        "train.learning_rate (command line) is NaN: expected a number (above 0 and below 10)",
    ):
        assert expected in shown


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=lroa", "is 'lroa': expected one of full, lora, qlora, dora"),
        ("train.epochs=.inf", "is Infinity"),
        ("train=3", r"train \(command line\) is 3: expected a section"),
        ("train.steps.x=3", r"train.steps \(command line\) is"),
        ("quantize.bits=7", "expected one of 2, 3, 4, 5, 6, 8"),
        ("quantize.mode=mxfp4", "mode mxfp4 requires bits=4 and group_size=32"),
        ("train.batch_tokens=100", r"batch_tokens=100 is below max_length=512"),
        ("extends=other", "only a recipe file can extend another"),
        ("adapter.layers=[1,-2]", "adapter.layers"),
        ("adapter.targets=[q_proj", "not a YAML value: line 1"),
        ("=3", "write key=value"),
        ("train..steps=3", "write key=value"),
    ],
)
def test_wrong_override(load: Any, override: str, message: str) -> None:
    with pytest.raises(SlimError, match=message):
        load("model: x\n", override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "holds a list"),
        (b"just text\n", "holds a single value"),
        (b"model: x\n  bad: [1, 2\n", "line 2, column"),
        (b"model: x\n\ttrain: 1\n", "line 2, column 1"),
        (b"model: \xff\xfe\n", "not UTF-8 .byte 7"),
        (b"model: x\ntrain: {seed: 1}\ntrain: {seed: 2}\n", r"line 3: key train is given twice"),
        (b"model: x\ntrain:\n  seed: 1\n  seed: 2\n", r"line 4: key train.seed is given twice"),
        (b"method: lora\n", "model is missing"),
        (b"model: 3\n", r"model \(r.yaml:1\) is 3: expected text"),
        (b"model: x\ntrain: &a\n  seed: *a\n", "not valid YAML"),
        (b"model: !!python/name:os.system x\n", "not valid YAML"),
        (b"? [a]\n: b\n", "a key must be a plain word"),
        (b"model: x\nextends: {a: b}\n", "line 2: extends is"),
        (b"model: x\nextends: r\n", "extend each other in a circle: r.yaml -> r.yaml"),
        (b"model: x\nextends: nowhere\n", "no recipe is called 'nowhere'"),
    ],
)
def test_wrong_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(SlimError, match=message):
        load_recipe(str(path))


def test_a_missing_file_and_an_unknown_name() -> None:
    with pytest.raises(SlimError, match="does not exist"):
        load_recipe("nowhere/r.yaml")
    with pytest.raises(SlimError) as error:
        load_recipe("tinylama-lora")
    assert "did you mean 'tinyllama-lora'?" in error.value.hint


def test_byte_order_mark_and_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: x\n")
    assert load_recipe(str(path)).recipe.model == "x"
    (tmp_path / "d.yaml").mkdir()
    with pytest.raises(SlimError, match="is a folder, expected a regular file"):
        load_recipe(str(tmp_path / "d.yaml"))


def test_from_values_names_its_origin() -> None:
    resolved = from_values({"model": "x", "train": {"steps": 3}}, "demo", "demo")
    assert resolved.origins["train.steps"] == "demo"
    with pytest.raises(SlimError, match=r"train.stpes \(demo\) is not a key"):
        from_values({"model": "x", "train": {"stpes": 3}}, "demo", "demo")


def test_shared_parts_are_found_and_not_listed() -> None:
    names = library.names("recipes")
    assert "tinyllama-lora" in names
    assert not any(name.startswith("_") for name in names)
    assert library.find("recipes", "_alpaca").is_file()
    for name in ("../recipes/tinyllama-lora", "", "."):
        with pytest.raises(SlimError):
            library.find("recipes", name)
