"""Small runs of every kind, in this process or in several ranks, one after another in one launch.

``run_on_ranks(cases, 2, folder)`` starts the ranks once; each case has a folder. A case may
kill the ranks that it names, in the middle of a step: it must be the last one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_slim.config.load import Resolved
from mlx_slim.data.plans import Plan
from mlx_slim.finetuning import build
from mlx_slim.runtime import world
from mlx_slim.training.loop import Loop
from tests.support.ranks import started_ranks
from tests.support.runs import Recorder, recipe

SCRIPT = "from tests.support.rank_runs import main; main()"


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        out: Its folder.
        model, data: Of the recipe.
        method: ``full``, ``lora``, ``qlora``, ``dora``; ``logits``, ``sequence``, ``mutual`` (of
            LoRA students); ``kto``, ``orpo``.
        teacher: Of a distillation.
        train: Keys of the section.
        threads: That compute a micro-batch.
        resume: Go on with the run in ``out``.
        kill: Ranks that kill themselves
        at: instead of taking this step.
    """

    out: str
    model: str
    data: str
    method: str = "lora"
    teacher: str = ""
    train: dict[str, Any] = field(default_factory=dict)
    threads: int = 2
    resume: bool = False
    kill: tuple[int, ...] = ()
    at: int = 0


def _resolved(case: Case) -> Resolved:
    from tests.distillation.test_run import recipe_with_teachers
    from tests.support.preferences import preference_recipe

    model, data = Path(case.model), Path(case.data)
    if case.method in ("kto", "orpo"):
        return preference_recipe(model, data, case.method, **case.train)
    if case.teacher:
        teachers = [{"model": case.teacher}]
        return recipe_with_teachers(model, data, teachers, train=case.train, method=case.method)
    return recipe(model, data, case.method, **case.train)


def run_case(case: Case, observer: Any = None) -> None:
    """Run a case on the ranks of this process."""
    from mlx_slim.distillation.run import distill
    from mlx_slim.finetuning.run import finetune
    from mlx_slim.preferences.run import train

    resolved = _resolved(case)
    workflow = distill if case.teacher else finetune
    if resolved.recipe.preference is not None:
        workflow = train
    before, threads = Loop._step, build.default_num_threads

    def step(self: Loop, epoch: int, fraction: float, plan: Plan) -> None:
        if self.state.step + 1 == case.at and world().rank() in case.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        before(self, epoch, fraction, plan)

    Loop._step, build.default_num_threads = step, lambda: case.threads
    try:
        workflow(resolved, Path(case.out), observer=observer or Recorder(), resume=case.resume)
    finally:
        Loop._step, build.default_num_threads = before, threads


def run_on_ranks(cases: list[Case], ranks: int, folder: Path) -> str:
    """Run ``cases`` on ``ranks`` ranks, started once; return what they print as errors."""
    words = json.dumps([asdict(case) for case in cases])
    with started_ranks(folder, ranks, SCRIPT, words) as processes:
        return "\n".join(process.communicate(timeout=300)[1] for process in processes)


def main() -> None:
    """Run the cases of the command line."""
    for values in json.loads(sys.argv[1]):
        run_case(Case(**{**values, "kill": tuple(values["kill"])}))
