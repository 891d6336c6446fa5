"""The loop of a sweep: what runs when, and what a killed or unusable trial does to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_slim.artifacts import write_json
from mlx_slim.cluster.jobs import Ended, Job
from mlx_slim.sweeping.folder import OUTCOME, STUDY_FILE
from mlx_slim.sweeping.launch import InProcess, InProcesses
from mlx_slim.sweeping.options import SweepOptions
from mlx_slim.sweeping.records import TrialOutcome, to_json
from mlx_slim.sweeping.search import InfeasibleError, UnusableInputError, search
from mlx_slim.sweeping.space import Parameter
from mlx_slim.sweeping.study import Proposal, StudyPlan, SweepStudy

RANK = Parameter("adapter.rank", low=1, high=64, whole=True)


def study_in(folder: Path, workers: int = 1) -> SweepStudy:
    options = SweepOptions(workers=workers, pruner="none")
    if not (folder / STUDY_FILE).exists():
        SweepStudy.create(folder / STUDY_FILE, options)
    return SweepStudy(folder / STUDY_FILE, StudyPlan((RANK,), options))


def complete(loss: float) -> TrialOutcome:
    return TrialOutcome("complete", loss, 1, 1, 1, 1.0, 1, [(1, loss)])


def name_of(proposal: Proposal) -> tuple[str, int]:
    return f"trials/{proposal.number}", 10 * (1 + proposal.number)


def test_killed_goes_on_infeasible_is_noted_and_unusable_ends(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    runs: list[str] = []

    def run(name: str) -> TrialOutcome:
        runs.append(name)
        killed = name == "trials/1" and runs.count(name) < 3
        return TrialOutcome("killed", why="killed by SIGKILL") if killed else complete(len(runs))

    def prepare(proposal: Proposal) -> tuple[str, int]:
        if proposal.number == 2:
            raise InfeasibleError("rank 3 is odd")
        return name_of(proposal)

    ended: list[int] = []
    search(study, 4, InProcess(run), prepare, lambda number, outcome: ended.append(number))
    assert runs == ["trials/0", "trials/1", "trials/1", "trials/1", "trials/3"]
    assert ended == [0, 1, 2, 3]
    rows = study.rows()
    assert [row.attempts for row in rows] == [1, 3, 1, 1]
    assert rows[2].outcome.state == "infeasible" and rows[2].outcome.why == "rank 3 is odd"

    def unusable(name: str) -> TrialOutcome:
        return TrialOutcome("failed", why="no such file", hint="name another")

    with pytest.raises(UnusableInputError, match="no such file"):
        search(study, 5, InProcess(unusable), name_of, lambda number, outcome: None)
    assert len(study.rows()) == 4  # the next one tries trial 4 again
    search(study, 5, InProcess(run), name_of, lambda number, outcome: None)
    assert study.rows()[4].attempts == 2


class Processes:
    """Stands for a pool of one: each process ends when it is waited for."""

    budget, most, far, shared = 99, 1, False, True

    def __init__(self, out: Path, codes: dict[str, list[int]]) -> None:
        self.out, self.codes = out, codes
        self.jobs: list[Job] = []
        self.running = 0

    @property
    def free(self) -> bool:
        return not self.running

    def start(self, job: Job) -> None:
        assert job.words[job.words.index("--only") + 1] == job.name
        self.jobs.append(job)
        self.running = 1

    def wait(self) -> Ended:
        job, self.running = self.jobs[-1], 0
        code = self.codes[job.name].pop(0) if self.codes.get(job.name) else 0
        if code == 0:
            write_json(self.out / job.name / OUTCOME, to_json(complete(1.0)))
        return Ended(job.name, code)


def launched(out: Path, codes: dict[str, list[int]]) -> Processes:
    processes = Processes(out, codes)
    launcher = InProcesses(out, processes, True)
    search(study_in(out), 6, launcher, name_of, lambda number, outcome: None)
    return processes


def test_a_trial_reserves_a_quarter_more_than_its_peak_and_never_more_than_there_is(
    tmp_path: Path,
) -> None:
    """Peaks are 10, 20, … 60 bytes of 99."""
    jobs = launched(tmp_path, {}).jobs
    assert [job.memory for job in jobs] == [12, 25, 37, 50, 62, 75]
    processes = Processes(tmp_path, {})
    InProcesses(tmp_path, processes, True).start("trials/0", 90)
    assert processes.jobs[0].memory == 99


def test_a_process_that_dies_is_started_again_as_long_as_it_gets_further(tmp_path: Path) -> None:
    checkpoint = tmp_path / "trials/1/run/checkpoints/step-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    stuck = launched(tmp_path, {"trials/1": [-9], "trials/2": [1]})
    rows = {row.number: row.outcome for row in study_in(tmp_path).rows()}
    assert rows[1].state == "infeasible" and rows[1].why == "killed by SIGKILL (out of memory?)"
    assert rows[2].state == "infeasible" and rows[2].why == "ended with exit code 1"
    assert rows[3].state == "complete" and len(stuck.jobs) == 6
