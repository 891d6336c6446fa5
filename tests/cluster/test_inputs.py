"""Inputs are what the coordinator saw, wherever a worker has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_slim.cluster.inputs import MODELS_VARIABLE, data_inputs, find, model_input, place
from mlx_slim.cluster.jobs import Input
from mlx_slim.data.sources import MIRROR_VARIABLE
from mlx_slim.errors import SlimError
from mlx_slim.hashing import hash_file


def test_found_by_name_and_checksum_and_placed_under_the_name_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, text in ((here / "models/toy", "{}"), (there / "toy", "{}"), (here, "rows")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ("config.json" if text == "{}" else "rows.jsonl")).write_text(text)
    monkeypatch.chdir(here)
    (model,), (rows,) = model_input("models/toy"), data_inputs([Path("rows.jsonl")])
    assert list(model_input("owner/name")) == []
    nowhere = tmp_path / "nowhere"
    assert find(model, here) == here / "models/toy"
    with pytest.raises(SlimError, match="models/toy is not here") as caught:
        find(model, nowhere)
    assert "--models" in caught.value.hint
    monkeypatch.setenv(MODELS_VARIABLE, str(there))
    monkeypatch.setenv(MIRROR_VARIABLE, str(there))
    assert find(model, nowhere) == there / "toy"
    (there / "rows.jsonl").write_text("others")
    with pytest.raises(SlimError, match=r"rows.jsonl is another one here: SHA-256"):
        find(rows, nowhere)
    place(model, there / "toy", nowhere, tmp_path / "work")
    assert (tmp_path / "work/models/toy/config.json").read_text() == "{}"
    outside = Input(str(here / "rows.jsonl"), "data", rows.sha256)
    place(outside, here / "rows.jsonl", nowhere, tmp_path / "work")
    with pytest.raises(SlimError, match="not here under this name"):
        place(outside, there / "rows.jsonl", nowhere, tmp_path / "work")


def test_rows_of_the_mirror_and_of_the_package_need_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_slim.config import library

    monkeypatch.setenv(MIRROR_VARIABLE, str(tmp_path))
    (tmp_path / "arc").mkdir()
    (tmp_path / "arc/test.jsonl").write_text("1")
    shipped = library.folder("evals").resolve() / "demo" / "train.jsonl"
    (rows,) = data_inputs([tmp_path / "arc/test.jsonl", shipped])
    assert rows.mirrored and rows.path == "arc/test.jsonl"
    assert find(rows, Path("/nowhere")) == tmp_path.resolve() / "arc/test.jsonl"
    # Named from a checkout of this repository, where it is a file of the working folder.
    relative = Input("evals/demo/train.jsonl", "data", hash_file(shipped))
    assert find(relative, Path("/nowhere")) == shipped
