"""The functions: the README's examples, lazy imports, names that are packages too."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mlx_slim
from mlx_slim.config.load import load_recipe
from mlx_slim.errors import SlimError
from tests.support.runs import write_rows

ROOT = Path(__file__).parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


def test_the_readme_has_examples() -> None:
    assert EXAMPLES
    for name in ("distill", "evaluate", "finetune", "plan", "prune", "quantize"):
        assert any(f"{name}(" in text for text in EXAMPLES), name


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_readme_run(
    example: str,
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLX_SLIM_DATA", raising=False)
    write_rows(tmp_path / "rows.jsonl", 40)
    model = tiny("llama-tied")
    # The same recipe over a tiny model that needs no hub.
    (tmp_path / "tiny.yaml").write_text(
        f"extends: smollm2-lora\nmodel: {model}\nrevision: null\n"
        "data: {format: auto}\ntrain: {max_length: 512, batch_tokens: 1024, accumulate: 1}\n"
    )
    text = example.replace('"smollm2-lora"', '"./tiny.yaml"')
    # No data mirror: the same rows are the text that importance is measured on.
    text = text.replace("ratio=0.5)", 'ratio=0.5, calibration="rows.jsonl")')
    text = text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model))
    exec(compile(text, "README.md", "exec"), {})
    assert "fits: True" in capsys.readouterr().out
    assert json.loads((tmp_path / "runs/api/run.json").read_text())["status"] == "complete"
    assert (tmp_path / "models/four-bit/config.json").exists()
    assert (tmp_path / "runs/scores/results.json").exists()
    assert json.loads((tmp_path / "runs/back/run.json").read_text())["distill"]["teachers"]


def test_importing_the_package_brings_nothing_heavy() -> None:
    code = (
        "import sys, mlx_slim\n"
        "heavy = {'mlx.core', 'mlx_lm', 'numpy', 'click', 'mlx_slim.api'} & set(sys.modules)\n"
        "print(sorted(heavy))\n"
        "from mlx_slim import distill, evaluate, prune, quantize\n"
        "print(callable(distill), callable(evaluate), callable(prune), callable(quantize))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "True True True True"]


def test_a_recipe_may_be_a_name_a_file_values_or_resolved(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    plan = mlx_slim.plan
    values = {"model": str(tiny("llama")), "data": {"path": "x"}, "train": {"batch_tokens": 1024}}
    changed = {"train.batch_tokens": 512, "method": "qlora", "quantize.group_size": 32}
    (tmp_path / "mine.yaml").write_text(json.dumps(values))
    actual = [
        plan(recipe, overrides=changed, budget="1GB")
        for recipe in (values, tmp_path / "mine.yaml", load_recipe(str(tmp_path / "mine.yaml")))
    ]
    assert len({f.predicted_peak_bytes for f in actual}) == 1
    assert actual[0].predicted_peak_bytes < plan(values, budget="1GB").predicted_peak_bytes
    assert actual[0].budget_bytes == 10**9
    assert values["train"] == {"batch_tokens": 1024}  # the caller's values stay
    assert plan("tinyllama-lora", mac="M2 16GB").fits


def test_errors_are_those_of_the_commands(tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="no Mac 'm9'"):
        mlx_slim.plan("tinyllama-lora", mac="m9")
    with pytest.raises(SlimError, match="stepz"):
        mlx_slim.plan("tinyllama-lora", overrides={"train.stepz": 3})
    with pytest.raises(SlimError):
        mlx_slim.quantize(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(AttributeError, match="no attribute 'finetunes'"):
        mlx_slim.finetunes  # noqa: B018
