"""The page of a run: complete, running, killed; what it says, that it escapes, how it looks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim import locks
from mlx_slim.artifacts import read_json, write_json
from mlx_slim.cli.main import run
from mlx_slim.config.load import Resolved
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.events import Event
from mlx_slim.finetuning.report import render
from mlx_slim.finetuning.run import finetune
from mlx_slim.run_dir import LOCK_FILE
from tests.compare.test_report import CHROMIUM, PROBE
from tests.support.imports import SLOW, imported_by
from tests.support.runs import Recorder, losses, recipe
from tests.support.tiny import TinyModels

BAD = "<script>alert(1)</script>"


def rows(path: Path) -> Path:
    """Write rows whose prompts are markup; one is too long and dropped."""
    lines = [{"prompt": f"{BAD} {i}", "completion": f"<b>{i}</b>"} for i in range(14)]
    lines.append({"prompt": "long " * 60, "completion": "x"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def with_answers(resolved: Resolved, count: int = 3) -> Resolved:
    """Return the recipe with so many answers on its page."""
    values = resolved.recipe.model_dump()
    changed = type(resolved.recipe).model_validate({**values, "report_answers": count})
    return Resolved(changed, resolved.origins, resolved.name, resolved.source)


@pytest.fixture(scope="module")
def complete(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a complete LoRA run of six steps, with three answers."""
    folder = tmp_path_factory.mktemp("page")
    resolved = recipe(tiny("llama"), rows(folder / "rows.jsonl"), steps=6, validate_every=2)
    finetune(with_answers(resolved), folder / "run", observer=Recorder())
    return folder / "run"


@pytest.fixture
def copy(complete: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete, tmp_path / "my run"))


def test_the_page_is_there_at_the_end_and_stands_alone(complete: Path) -> None:
    page = (complete / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", page)
    assert "<script" not in page and "@import" not in page
    assert BAD not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    assert page.count('<svg class="chart"') == 4


def test_the_page_is_written_without_what_trains(copy: Path) -> None:
    code = f"from mlx_slim.cli.main import run; run(['report', {str(copy)!r}])"
    out, heavy = imported_by(code)
    assert "report.html" in out and not any(f"'{name}'" in heavy for name in SLOW), heavy


def test_the_page_says_what_the_records_say(complete: Path) -> None:
    page = (complete / "report.html").read_text()
    record, ledger = read_json(complete / "run.json"), read_json(complete / "data_ledger.json")
    done = record["result"]["done"]
    assert f"{done['best_validation']:.4f} at step {done['best_step']}" in page
    assert "6 of 6" in page and "predicted before the run" in page
    assert f"{ledger['totals']['rows_used']} of {ledger['totals']['rows_given']} rows" in page
    assert "longer than 128 tokens" in page and "rows.jsonl" in page
    for name in ("training, smoothed", "validation", "predicted peak"):
        assert name in page
    for row in read_json(complete / "answers.json")["rows"]:
        assert row["before"] is not None and row["after"] is not None
    assert f"mlx-slim chat {record['result']['model']} --adapter {complete / 'adapters'}" in page


def test_answers_are_of_validation_rows_with_their_references(complete: Path) -> None:
    answers = read_json(complete / "answers.json")
    assert len(answers["rows"]) == 3 and answers["skipped"] is None
    for row in answers["rows"]:
        number = re.search(r"</script> (\d+)", row["prompt"])
        assert number and row["reference"].strip() == f"<b>{number[1]}</b>"
        assert not row["prompt"].rstrip().endswith("</b>")


def test_no_path_but_those_that_were_typed(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(complete.parent)
    page = render(Path("run"))
    typed = read_json(complete / "recipe.json")["recipe"]
    for shown in (typed["model"], typed["data"]["path"]):
        page = page.replace(shown, "")
    assert "--adapter run/adapters" in page
    assert str(complete) not in page and str(Path.home()) not in page.replace("/root", "")


def test_quoted_commands_in_a_folder_with_a_space(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(copy.parent)
    assert run(["report", copy.name]) == 0
    out = capsys.readouterr()
    assert out.out == f"report: {Path(copy.name) / 'report.html'}\n"
    assert "mlx-slim report 'my run' --watch" in out.err
    assert "&#39;my run/adapters&#39;" in (copy / "report.html").read_text()


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_run_shows_what_there_is(copy: Path, torn: bool) -> None:
    (copy / "run.json").unlink()
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    half = "".join(line for line in lines if '"step": 4' not in line and '"step": 5' not in line)
    cut = half[: half.index('"event": "step", "step": 3') + 40] if torn else half
    (copy / "metrics.jsonl").write_text(cut)
    page = render(copy)
    assert "stopped" in page and "--resume" in page
    assert page.count('<svg class="chart"') == 4


def test_before_the_first_step_and_while_it_runs(copy: Path) -> None:
    for name in ("run.json", "metrics.jsonl", "answers.json", "data_ledger.json"):
        (copy / name).unlink()
    lock = locks.acquire(copy / LOCK_FILE)
    assert lock is not None
    page = render(copy)
    lock.release()
    assert "running" in page and "No step was taken yet" in page
    assert "not counted yet" in page and "the run wrote none" in page
    assert "stopped" in render(copy)


def test_answers_change_no_step_and_survive_a_resume(
    tiny: TinyModels, complete: Path, tmp_path: Path
) -> None:
    resolved = recipe(tiny("llama"), complete.parent / "rows.jsonl", steps=6, validate_every=2)
    finetune(resolved, tmp_path / "without", observer=Recorder())
    assert losses(tmp_path / "without") == losses(complete)
    assert read_json(tmp_path / "without" / "answers.json")["skipped"] == "report_answers is 0"

    class Stop(Recorder):
        def notify(self, event: Event) -> None:
            if getattr(event, "step", 0) == 3:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        finetune(with_answers(resolved), tmp_path / "run", observer=Stop())
    finetune(with_answers(resolved), tmp_path / "run", observer=Recorder(), resume=True)
    assert losses(tmp_path / "run") == losses(complete)
    assert read_json(tmp_path / "run" / "answers.json") == read_json(complete / "answers.json")


def test_the_peak_is_that_of_training(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(*_: object) -> None:
        mx.eval(mx.zeros((64, 1024, 1024)))  # 256 MiB

    monkeypatch.setattr("mlx_slim.finetuning.run.answer_before", hungry)
    resolved = recipe(tiny("llama"), rows(tmp_path / "rows.jsonl"), steps=1)
    result = finetune(resolved, tmp_path / "run", observer=Recorder())
    assert result.done.peak_memory_bytes < 64 << 20


def test_full_tuning_answers_before_it_has_learned(
    tiny: TinyModels, complete: Path, tmp_path: Path
) -> None:
    data = complete.parent / "rows.jsonl"
    resolved = with_answers(recipe(tiny("llama"), data, "full", steps=6, validate_every=2))
    finetune(resolved, tmp_path / "run", observer=Recorder())
    answers, others = (read_json(path / "answers.json") for path in (tmp_path / "run", complete))
    for row, other in zip(answers["rows"], others["rows"], strict=True):
        assert row["before"] == other["before"]  # of the same base, whatever trains on it
        assert row["after"] is not None
    assert (
        f"mlx-slim chat {tmp_path / 'run' / 'model'}" in (tmp_path / "run/report.html").read_text()
    )


def test_without_validation_rows_it_says_why(tiny: TinyModels, tmp_path: Path) -> None:
    values = with_answers(recipe(tiny("llama"), rows(tmp_path / "rows.jsonl"), steps=1))
    record = values.recipe.model_dump()
    record["data"]["validation"] = 0
    changed = type(values.recipe).model_validate(record)
    finetune(Resolved(changed, {}, "small", "test"), tmp_path / "run", observer=Recorder())
    assert "there are no validation rows" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "EMPTY"], "neither a run"),
        (["report", "EMPTY", "--watch"], "holds no run to watch"),
        (["report", "RUN", "--verify"], "--verify is for a matrix"),
        (["report", "RUN", "--port", "80"], "--watch"),
    ],
)
def test_bad_input_is_one_line(
    complete: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    places = {"EMPTY": str(tmp_path), "RUN": str(complete)}
    assert run([places.get(word, word) for word in words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("recipe.json", "recipe.method", None),
        ("run.json", "result.done.seconds", "soon"),
        ("run.json", "result.trainable", None),
        ("run.json", "provenance.versions", []),
        ("data_ledger.json", "totals", 3),
        ("data_ledger.json", "sources.0.rows_given", None),
        ("answers.json", "rows.0.prompt", 7),
    ],
)
def test_a_damaged_record_is_one_line_that_names_file_and_key(
    copy: Path, capsys: pytest.CaptureFixture[str], name: str, path: str, value: object
) -> None:
    """A key is removed (None), or holds another type."""
    record = read_json(copy / name)
    *sections, key = path.split(".")
    inside = record
    for section in sections:
        inside = inside[int(section)] if section.isdigit() else inside[section]
    inside[key] = value
    if value is None:
        del inside[key]
    write_json(copy / name, record)
    assert run(["report", str(copy)]) == 2
    (error, _) = capsys.readouterr().err.splitlines()
    assert f"{copy.name}/{name}" in error and key in error


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value in a record."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in children:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from _leaves(inner, (*path, key))


@pytest.mark.parametrize("name", ["run.json", "data_ledger.json", "answers.json"])
def test_whatever_is_missing_the_file_is_named_or_the_page_does_without(
    copy: Path, name: str
) -> None:
    whole = read_json(copy / name)
    for place in _leaves({k: v for k, v in whole.items() if k not in ("recipe", "origins")}):
        record = json.loads(json.dumps(whole))
        inside = record
        for part in place[:-1]:
            inside = inside[part]
        del inside[place[-1]]
        write_json(copy / name, record)
        try:
            render(copy)
        except SlimError as error:
            assert name in error.message, place


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "x"},
        {"step": None},
        {"step": 10**60},
        {"loss": -1e308},
        {"peak_memory_bytes": float("inf")},
        {"epoch": "\ud800"},
    ],
)
def test_a_step_that_cannot_be_is_left_out(copy: Path, changes: dict[str, object]) -> None:
    page = render(copy)
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    last = json.loads([line for line in lines if '"event": "step"' in line][-1])
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**last, **changes}) + "\n" + '{"event": "predicted"}\n')
    assert render(copy) == page


def test_a_loss_that_is_not_a_number_stays(copy: Path) -> None:
    text = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(re.sub(r'"loss": [\d.]+', '"loss": NaN', text))
    assert "nan" in render(copy) and render(copy).count('<svg class="chart"') == 3


def test_a_name_that_is_not_utf_8_can_be_written(copy: Path) -> None:
    place = copy.rename(copy.with_name("run\udcff"))
    assert "run?" in render(place)


def test_a_run_is_worth_more_than_its_page(tiny: TinyModels, copy: Path) -> None:
    data = json.loads((copy / "recipe.json").read_text())["recipe"]["data"]["path"]
    resolved = with_answers(recipe(tiny("llama"), Path(data), steps=6, validate_every=2))
    (copy / "run.json").unlink()
    answers = {**read_json(copy / "answers.json"), "rows": [1]}
    (copy / "answers.json").write_text(json.dumps(answers))
    told = Recorder()
    finetune(resolved, copy, observer=told, resume=True)
    assert (copy / "run.json").exists()
    assert any("its page was not written" in getattr(event, "message", "") for event in told.events)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [500, 1280])
def test_it_opens_in_a_browser_with_curves_and_answers(
    complete: Path, tmp_path: Path, width: int
) -> None:
    page = tmp_path / "probe.html"
    text = (complete / "report.html").read_text()
    page.write_text(text.replace("</body>", PROBE + "</body>"))
    dumped = subprocess.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1600"),
            *("--enable-logging=stderr", "--v=0", "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    layout = json.loads(re.search(r"<title>(\{.*?\})</title>", dumped.stdout)[1])  # type: ignore[index]
    assert layout["plots"] == 4
    assert (layout["wide"], layout["bad"], layout["empty"]) == (False, 0, 0)
    assert dumped.stdout.count("after training") == 3
    assert "CONSOLE" not in dumped.stderr
