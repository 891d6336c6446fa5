"""The report from stored results: what it says, that it can be checked, and how it looks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_slim.artifacts import read_json, write_json
from mlx_slim.cli.main import run
from mlx_slim.compare.evidence import machine_of
from mlx_slim.compare.report import report
from tests.support.matrix import write_matrix

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_matrix(tmp_path_factory.mktemp("matrix") / "toy")
    report(folder)
    return folder


@pytest.fixture
def copy(matrix: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(matrix, tmp_path / "copy"))


def test_page_stands_alone_and_escapes_what_it_shows(matrix: Path) -> None:
    page = (matrix / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", page)
    assert "<script" not in page and "@import" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "Question 0 of hellaswag: &lt;b&gt;x&lt;/b&gt;" in page or "&lt;b&gt;x&lt;/b&gt;" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    assert not re.findall(r"#0[ab]0[ab]0\d", page)  # every placeholder became a variable


def test_page_markdown_and_json_say_the_same(matrix: Path) -> None:
    results = read_json(matrix / "results.json")
    texts = [(matrix / name).read_text() for name in ("report.html", "report.md")]
    assert results["headline"][0].startswith("4-bit QLoRA keeps")
    assert "are often missed" in results["headline"][-1]
    for text in texts:
        for row in results["rows"]:
            for score in row["scores"].values():
                assert f"{score['k']}/{score['n']}" in text
        for item in [*results["failed"], *results["omitted"]]:
            assert item.get("cell", item.get("model")) in text
        assert "published" in text and "42.99"[:2] in text
    assert [line.replace("'", "&#39;") for line in results["headline"]] == [
        line.replace("'", "&#39;") for line in results["headline"]
    ]
    assert all(line.replace("'", "&#39;") in texts[0] for line in results["headline"])
    assert all(line in texts[1] for line in results["headline"])


def test_differences_are_paired_corrected_and_of_the_right_cells(matrix: Path) -> None:
    results = read_json(matrix / "results.json")
    pairs = {(c["first"], c["second"], c["why"]) for c in results["contrasts"]}
    assert ("toy0-base", "toy0-quantized", "against the base") in pairs
    assert ("toy0-quantized", "toy0-qlora-s0", "what tuning adds to the 4-bit base") in pairs
    assert ("toy0-lora-s0", "toy0-full-s0", "between methods") in pairs
    assert ("toy0-qlora-s0", "toy0-fused-s0", "what fusing costs") in pairs
    for row in results["contrasts"]:
        assert row["p_holm"] >= row["p_value"]
        assert row["gained"] + row["lost"] <= row["n"]
        assert abs(row["delta"] - (row["gained"] - row["lost"]) / row["n"]) < 1e-12
        assert "equal" not in row["verdict"]


def test_extraction_published_flips_and_settings(matrix: Path) -> None:
    results = read_json(matrix / "results.json")
    answers = (matrix / "cells/toy0-base/eval/gsm8k/samples_gsm8k.jsonl").read_text().splitlines()
    invalid = sum(json.loads(line)["strict"] == "[invalid]" for line in answers)
    row = next(e for e in results["extraction"] if e["cell"] == "toy0-base")
    assert row["unextracted"]["strict"] == invalid
    assert sum(row["stopped"].values()) == row["n"]
    (published,) = results["published"]
    assert (published["published"], published["all_rows"], published["n"]) == (0.4299, False, 200)
    flip = next(f for f in results["flips"] if f["task"] == "gsm8k")
    assert flip["prompt"] and flip["before"] != flip["after"]
    assert results["settings"]["own"]["train.learning_rate"]["toy0-lora-s0"] == 1e-3
    assert "adapter.rank" in results["settings"]["common"]


def test_several_seeds_get_a_mean_and_a_spread(tmp_path: Path) -> None:
    folder = write_matrix(tmp_path / "m", seeds=3, methods=("base", "lora"))
    results = report(folder).results
    (item,) = results["seeds"]
    values = [row["scores"]["mmlu"]["value"] for row in results["rows"] if row["method"] == "lora"]
    assert item["tasks"]["mmlu"]["mean"] == pytest.approx(sum(values) / 3)
    assert item["seeds"] == [0, 1, 2]
    assert "SD" in (folder / "report.md").read_text()


def test_cells_with_other_questions_are_not_compared(copy: Path) -> None:
    path = copy / "cells/toy0-lora-s0/eval/hellaswag/results.json"
    results = read_json(path)
    results["tasks"]["hellaswag"]["rows_sha256"] = "f" * 64
    write_json(path, results)
    results_again = report(copy).results
    assert any("rows_sha256 differ" in note for note in results_again["notes"])
    assert not any(
        c["task"] == "hellaswag" and c["second"] == "toy0-lora-s0"
        for c in results_again["contrasts"]
    )


def test_one_damaged_old_or_missing_cell_costs_itself_only(copy: Path) -> None:
    cells = copy / "cells"
    (cells / "toy0-full-s0/eval/mmlu/samples_mmlu.jsonl").write_text("{broken\n")
    manifest = read_json(cells / "toy0-dora-s0/cell.json")
    write_json(cells / "toy0-dora-s0/cell.json", {**manifest, "schema_version": 99})
    (cells / "toy0-lora-s0/cell.json").unlink()
    write_json(copy / "failed/toy0-lora-s0.json", {"cell": "toy0-lora-s0", "reason": "no memory"})
    failed = {item["cell"]: item["why"] for item in report(copy).results["failed"]}
    assert "line 1 is damaged" in failed["toy0-full-s0"]
    assert "another version" in failed["toy0-dora-s0"]
    assert failed["toy0-lora-s0"] == "no memory"
    assert "no memory" in (copy / "report.html").read_text()


def test_a_folder_of_another_version_or_of_nothing_is_one_line(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_json(copy / "matrix.json")
    write_json(copy / "matrix.json", {**record, "schema_version": 7})
    assert run(["report", str(copy)]) == 2
    assert "schema_version 7" in capsys.readouterr().err
    assert run(["report", str(copy / "cells")]) == 2
    shutil.rmtree(copy / "cells")
    write_json(copy / "matrix.json", record)
    assert run(["report", str(copy)]) == 2
    assert "no complete cell" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("matrix.json", {"models": []}),
        ("matrix.json", {"title": None, "omitted": 3}),
        ("matrix.json", {"provenance": "x"}),
        ("cells/toy0-base/cell.json", {"model": ["a"]}),
        ("cells/toy0-full-s0/cell.json", {"recipe": 3}),
        ("cells/toy0-full-s0/cell.json", {"train": [1]}),
        ("sweeps/toy0-lora/sweep.json", {"rows": 5, "runs": 5, "model": None}),
    ],
)
def test_a_damaged_record_is_one_line_or_costs_its_cell(
    copy: Path, capsys: pytest.CaptureFixture[str], file: str, change: Any
) -> None:
    write_json(copy / file, {**read_json(copy / file), **change})
    for words in ([], ["--verify"]):
        code = run(["report", str(copy), *words])
        errors = capsys.readouterr().err
        assert code in (0, 2), errors
        assert "internal error" not in errors
        assert code == 0 or str(copy) in errors


def test_an_answer_that_is_no_fraction_excludes_its_cell(copy: Path) -> None:
    path = copy / "cells/toy0-full-s0/eval/hellaswag/samples_hellaswag.jsonl"
    path.write_text(path.read_text().replace('"acc": 1', '"acc": 7', 1))
    failed = {item["cell"]: item["why"] for item in report(copy).results["failed"]}
    assert "acc is 7, expected a number from 0 to 1" in failed["toy0-full-s0"]


PROBE = """
<script>
addEventListener('load', () => {
  const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  const bad = [...document.images].filter(i => !i.complete || !i.naturalWidth).length;
  const empty = [...document.querySelectorAll('figure svg')].filter(
    s => s.getBoundingClientRect().height < 20).length;
  const plots = document.querySelectorAll('svg').length;
  document.title = JSON.stringify({wide, bad, empty, plots});
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [500, 1280])
def test_opens_in_a_browser_without_errors_or_overflow(
    matrix: Path, tmp_path: Path, width: int
) -> None:
    page = tmp_path / "probe.html"
    text = (matrix / "report.html").read_text()
    page.write_text(text.replace("</body>", PROBE + "</body>"))
    picture = tmp_path / "page.png"
    base = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1600"),
        *("--enable-logging=stderr", "--v=0"),
    ]
    dumped = subprocess.run(
        [*base, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    title = re.search(r"<title>(\{.*?\})</title>", dumped.stdout)
    assert title is not None
    layout = json.loads(title[1])
    assert layout["plots"] >= 6
    assert (layout["wide"], layout["bad"], layout["empty"]) == (False, 0, 0)
    shot = subprocess.run(
        [*base, f"--screenshot={picture}", (matrix / "report.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in dumped.stderr + shot.stderr
    assert picture.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("cells", "machine", "elsewhere"),
    [
        ((None, None), "two cores", []),
        (("one", "one"), "one", []),
        (("one", None), "two cores", ["a"]),
    ],
)
def test_the_machine_is_that_of_the_cells(
    cells: tuple[str | None, ...], machine: str, elsewhere: list[str]
) -> None:
    """Jobs that divide a machine's cores ran on fewer than the command that started them."""
    origins = [None if name is None else {"machine": name} for name in cells]
    stored: Any = SimpleNamespace(
        record=SimpleNamespace(provenance={"machine": "two cores"}),
        cells=[
            SimpleNamespace(name=name, record=SimpleNamespace(provenance=provenance))
            for name, provenance in zip("ab", origins, strict=True)
        ],
    )
    shown = machine_of(stored)
    assert (shown["machine"], shown["cells_made_elsewhere"]) == (machine, elsewhere)
