"""A candidate as a job: what its process reads, what it leaves, what it does.

Invariant: a candidate reads of the search's folder its request, its recipe and the scores of its
first cut, which ranking has measured; no two write one file: each has targets of its own. Used by
``slimming/making.py`` and ``cli/slim.py``. Try it: ``mlx-slim slim -o DIR --only candidates/KEY``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_slim.artifacts import write_json
from mlx_slim.cluster.inputs import data_inputs, model_input
from mlx_slim.cluster.jobs import Input, Job
from mlx_slim.cluster.recipe_inputs import task_inputs
from mlx_slim.config.schema import SourceConfig
from mlx_slim.data.sources import find_local
from mlx_slim.errors import SlimError
from mlx_slim.events import Observer
from mlx_slim.quantization.calibration import DEFAULT_SOURCE
from mlx_slim.reading import library_errors, read_object
from mlx_slim.slimming import build, recovery
from mlx_slim.slimming.block_training import ROWS_FILE
from mlx_slim.slimming.candidate import Candidate
from mlx_slim.slimming.folder import CANDIDATES, MODEL, SCORES, TARGETS
from mlx_slim.slimming.material import Material
from mlx_slim.slimming.questions import TaskPlan, answer

REQUEST, FAILURE = "job.json", "failed.json"  # in the folder of a candidate
# What only a resume needs, and weights that the model was made from.
_SCRATCH = ("checkpoints", "tokens", TARGETS, "pruned-1", "pruned-2", "adapters", "base")


@dataclass(frozen=True)
class CandidateRequest:
    """``job.json``: what the process of a candidate is to make and to score.

    Attributes:
        source: The original.
        revision: Of a hub model.
        data: Rows, as ``Material.data``.
        data_dir: Data mirror of the tasks; None takes ``MLX_SLIM_DATA``.
        candidate: What it is.
        tasks: The questions.
    """

    source: str
    revision: str | None
    data: str | None
    data_dir: str | None
    candidate: Candidate
    tasks: tuple[TaskPlan, ...]


def read_request(folder: Path) -> CandidateRequest:
    """Return the request in the folder of a candidate.

    Raises:
        SlimError: If there is none, or it is damaged.
    """
    file = folder / REQUEST
    if not file.is_file():
        raise SlimError(f"{folder} holds no candidate", "run the search without --only")
    values = read_object(file, candidate=dict, tasks=list)
    with library_errors(f"{file} is damaged", "run the search again with --resume"):
        candidate = Candidate.from_json(values["candidate"])
        tasks = tuple(TaskPlan(**task) for task in values["tasks"])
        return CandidateRequest(**{**values, "candidate": candidate, "tasks": tasks})


def run_candidate(out: Path, name: str, observer: Observer) -> None:
    """Make the candidate ``name`` of the search in ``out``, and score it on the selection.

    Raises:
        SlimError: If there is no such candidate, or as ``build.make``.
        Interrupted: Ctrl-C; the state of its recovery is saved.
    """
    folder = out / name
    request = read_request(folder)
    source, revision, data = request.source, request.revision, request.data
    material = Material(source, revision, data, out, folder / TARGETS)
    build.make(material, request.candidate, folder, observer)
    data_dir = None if request.data_dir is None else Path(request.data_dir)
    for plan in request.tasks:
        scores = out / SCORES / request.candidate.key / plan.name
        answer(folder / MODEL, plan, scores, data_dir, observer, whole=False)
    shutil.rmtree(material.targets, ignore_errors=True)


def candidate_job(out: Path, request: CandidateRequest, memory: int, *, far: bool) -> Job:
    """Write the request of a candidate, and return its process.

    Args:
        out: Folder of the search; the recipe of the recovery is there.
        request: What is made and scored.
        memory: Bytes that it may use.
        far: Whether it may run where the files of this machine are not.

    Raises:
        SlimError: If an input cannot be read.
    """
    key = request.candidate.key
    name = f"{CANDIDATES}/{key}"
    write_json(out / name / REQUEST, asdict(request))
    reads = [f"{name}/{REQUEST}", f"{name}/{recovery.RECIPE}", f"{name}/{ROWS_FILE}"]
    if request.candidate.cuts:
        material = Material(request.source, request.revision, request.data, out, out)
        scores = material.scores_at(request.candidate, 0)
        reads += [scores.name] if scores is not None else []
    return Job(
        name=name,
        words=("slim", "--only", name),
        memory=memory,
        inputs=tuple(dict.fromkeys(_inputs(request))) if far else (),
        reads=tuple(reads),
        writes=(name, f"{SCORES}/{key}"),
        without=_SCRATCH,
        note=f"{name}/{FAILURE}",
    )


def _inputs(request: CandidateRequest) -> Iterator[Input]:
    yield from model_input(request.source)
    rows = find_local(SourceConfig(path=request.data or DEFAULT_SOURCE))
    yield from data_inputs(rows.files if rows is not None else [])
    names: Sequence[str] = [plan.task for plan in request.tasks]
    data_dir = None if request.data_dir is None else Path(request.data_dir)
    yield from task_inputs(names, data_dir)
