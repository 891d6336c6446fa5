"""The PyTorch sides of a benchmark see the rows, tokens and adapters that ours sees.

Needs PyTorch, PEFT and lm-eval; skipped without them. Run: ``make parity``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlx_slim.bench import eval_sides, sides
from mlx_slim.config import library
from mlx_slim.errors import SlimError
from mlx_slim.export.model import export_hf
from tests.parity.optional import needed
from tests.support.runs import write_rows
from tests.support.tiny import TinyModels

for name in ("torch", "peft", "lm_eval"):
    needed(name)

from mlx_slim.bench import torch_sides  # noqa: E402 - skipped above


@pytest.fixture(scope="module")
def model(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hf") / "llama"
    export_hf(tiny("llama"), folder)
    return str(folder)


def test_peft_trains_the_tokens_and_the_adapter_that_we_train(model: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    work = sides.TrainWork(model, str(rows), "lora", 4, 96, "float32")
    theirs, ours = torch_sides.peft(work), sides.ours(work)
    every = sum(len(ids) for ids, _ in torch_sides._rows(work))
    assert theirs["steps"] == 24 // 4 - sides.WARMUP_STEPS
    assert 0 < theirs["tokens"] < every <= theirs["computed_tokens"]
    assert 0 < ours["tokens"] < every <= ours["computed_tokens"]
    assert theirs["trained_parameters"] == ours["trained_parameters"]
    assert theirs["process_peak_bytes"] > 1e8 and ours["process_peak_bytes"] > 1e8
    full = torch_sides.peft(replace(work, method="full"))
    assert full["trained_parameters"] > 5 * theirs["trained_parameters"]
    with pytest.raises(SlimError, match="bitsandbytes"):
        torch_sides.peft(replace(work, method="qlora"))


def test_the_harness_answers_the_same_questions(model: str, tmp_path: Path) -> None:
    work = eval_sides.EvalWork(
        model, str(library.folder("evals") / "bench" / "category.yaml"), 4, 0, None, "float32"
    )
    theirs, ours = torch_sides.lm_eval(work), eval_sides.ours(work)
    assert theirs["questions"] == ours["questions"] == 4
    for one, other in zip(theirs["answers"], ours["answers"], strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"q": "{n} and 1 is", "a": "{n + 1}"}}\n' for n in range(4))
    )
    (tmp_path / "sums.yaml").write_text(
        "about: sums\nlicence: CC0-1.0\nkind: generation\ndata: {path: rows.jsonl}\n"
        "prompt: '{{ q }}'\ntarget: '{{ a }}'\nmax_tokens: 6\nmetrics: [exact_match]\n"
    )
    work = replace(work, task=str(tmp_path / "sums.yaml"), num_fewshot=None)
    assert torch_sides.lm_eval(work)["answers"] == eval_sides.ours(work)["answers"]
