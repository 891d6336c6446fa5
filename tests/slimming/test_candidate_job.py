"""What the process of a candidate reads and leaves; what ``--only`` refuses."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mlx_slim.cli.main import run
from mlx_slim.errors import SlimError
from mlx_slim.slimming.candidate import Cut
from mlx_slim.slimming.candidate_job import (
    REQUEST,
    CandidateRequest,
    candidate_job,
    read_request,
)
from mlx_slim.slimming.questions import plan_questions
from mlx_slim.slimming.request import space_of
from tests.slimming.conftest import Setting


def request_in(setting: Setting) -> CandidateRequest:
    model, options = setting
    candidate = space_of(model, options).candidate(4, (Cut("depth", layers=1),))
    tasks = tuple(plan_questions(options))
    return CandidateRequest(str(model), None, options.data, None, candidate, tasks)


def test_a_job_reads_its_request_and_scores_and_names_its_inputs(
    setting: Setting, tmp_path: Path
) -> None:
    request = request_in(setting)
    name = f"candidates/{request.candidate.key}"
    job = candidate_job(tmp_path, request, 7, far=True)
    assert job.words == ("slim", "--only", name) and job.memory == 7
    scores = "importance-depth.safetensors"
    assert job.reads == (
        f"{name}/job.json",
        f"{name}/recover.yaml",
        f"{name}/rows.json",
        scores,
    )
    assert job.writes == (name, f"scores/{request.candidate.key}")
    kinds = [(one.kind, Path(one.path).name) for one in job.inputs]
    model, options = setting
    rows = Path(str(options.data)).name
    task = Path(options.tasks[0]).name
    assert kinds == [("model", model.name), ("data", rows), ("data", task), ("data", "rows.jsonl")]
    assert candidate_job(tmp_path, request, 7, far=False).inputs == ()
    assert read_request(tmp_path / name) == request
    whole = replace(request, candidate=space_of(model, options).candidate(8, ()))
    assert len(candidate_job(tmp_path, whole, 7, far=False).reads) == 3


def test_a_damaged_request_is_one_line(setting: Setting, tmp_path: Path) -> None:
    values = asdict(request_in(setting))
    values["tasks"][0]["half"] = values["candidate"]["cost"] = None
    (tmp_path / REQUEST).write_text(json.dumps(values))
    with pytest.raises(SlimError, match=r"job\.json is damaged"):
        read_request(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "candidates/x"], "no search to make a candidate of"),
        (["--only", "candidates/x", "-o", "gone"], "gone/candidates/x holds no candidate"),
        ([], "Missing argument 'MODEL'"),
    ],
)
def test_misuse_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert run(["slim", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_a_failure_is_in_the_folder_of_the_candidate(setting: Setting, tmp_path: Path) -> None:
    request = replace(request_in(setting), source=str(tmp_path / "gone"))
    job = candidate_job(tmp_path, request, 7, far=False)
    assert run([*job.words, "-o", str(tmp_path)]) == 2
    assert job.note is not None
    assert "gone" in json.loads((tmp_path / job.note).read_text())["reason"]
