"""Runs seeded mutations in forked workers that are killed when they hang.

One process imports everything and computes nothing (MLX's threads do not survive a fork), makes the
valid inputs in a child, then forks two workers. A worker uses one mutated input after the other in
process; one that stays with a mutation for 5 s is killed, which counts as a failure, and another
goes on behind it. A mutation may be refused (``SlimError``) or work; it may not raise anything
else, end the process, take a gigabyte, or leave anything beside its input. Repeat one, with what
was done to the file: ``python -m tests.support.fuzz_run FOLDER --seed S --case N``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.support.fuzz import mutate

SECONDS = 5.0  # that one mutation may take
_MOST_BYTES = 1 << 30  # that one mutation may add to the largest memory so far
_LONGEST = 4000  # characters of a refusal


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        name: For messages.
        make: Writes a valid input into a folder that exists.
        files: Patterns inside that folder: one file of them is mutated.
        use: Reads the folder in process; may write the second path, whole or not at all.
        command: The command line that reads the folder and may write the second path.
        weight: How often it is drawn, against the others.
    """

    name: str
    make: Callable[[Path], None]
    files: tuple[str, ...]
    use: Callable[[Path, Path], None]
    command: Callable[[Path, Path], list[str]] | None = None
    weight: int = 1


def targets() -> list[Target]:
    """Return every kind of input, in a fixed order."""
    from tests.support import fuzz_data, fuzz_models, fuzz_scores

    return [*fuzz_models.TARGETS, *fuzz_data.TARGETS, *fuzz_scores.TARGETS]


def make_valid(into: Path) -> None:
    """Write the valid input of each target into ``into/NAME``."""
    for target in targets():
        folder = into / target.name
        folder.mkdir(parents=True)
        target.make(folder)


def mutated(seed: int, case: int, valid: Path, scratch: Path, only: list[Target]) -> tuple:
    """Put the mutated input of a case into ``scratch/in``; return its target and what was done."""
    random = Random(f"{seed}/{case}")
    target = random.choices(only, [one.weight for one in only])[0]
    source = scratch / "in"
    shutil.copytree(valid / target.name, source, symlinks=True)
    files = [path for pattern in target.files for path in sorted(source.glob(pattern))]
    return target, mutate(random, random.choice(files))


def leftovers(scratch: Path, before: set[str]) -> list[str]:
    """Return what lies in ``scratch`` besides the input as it was and a whole output."""
    now = {path.relative_to(scratch).as_posix() for path in _walk(scratch)}
    return sorted(
        name for name in now - before if name.split("/")[0] != "out" or "mlx-slim-" in name
    )


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            yield Path(root) / name


# ------------------------------------------------------------------------------------- worker


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def one_case(seed: int, case: int, valid: Path, scratch: Path, only: list[Target]) -> dict:
    """Use one mutated input; return what came of it."""
    from mlx_slim.errors import SlimError

    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "tmp").mkdir(parents=True)
    tempfile.tempdir = str(scratch / "tmp")
    target, edits = mutated(seed, case, valid, scratch, only)
    before = {path.relative_to(scratch).as_posix() for path in _walk(scratch)}
    peak, began = _peak_bytes(), time.perf_counter()
    problem = ""
    try:
        target.use(scratch / "in", scratch / "out")
        outcome = "used"
    except SlimError as error:
        outcome = "refused"
        if len(error.message) > _LONGEST or not error.message.strip():
            problem = f"a refusal of {len(error.message)} characters: {error.message[:200]}"
        edits += f" [{str(error)[:300]}]"
    except BaseException:
        outcome, problem = "raised", traceback.format_exc()[-3000:]
    if not problem and (left := leftovers(scratch, before)):
        problem = f"left behind: {left[:5]}"
    if outcome != "used" and (scratch / "out").exists():
        problem = problem or "an output of an input that was refused"
    if not problem and (grown := _peak_bytes() - peak) > _MOST_BYTES:
        problem = f"took {grown / 1e9:.1f} GB"
    return {
        "case": case,
        "target": target.name,
        "edits": edits,
        "outcome": outcome,
        "problem": problem,
        "seconds": round(time.perf_counter() - began, 3),
    }


def _work(
    seed: int, cases: list[int], valid: Path, scratch: Path, only: list[Target], out: int
) -> None:
    for case in cases:
        os.write(out, (json.dumps({"begin": case}) + "\n").encode())
        record = one_case(seed, case, valid, scratch, only)
        os.write(out, (json.dumps(record) + "\n").encode("utf-8", "replace"))


@dataclass
class _Worker:
    """A worker, what it still has to do, and since when it is at its case."""

    cases: list[int]
    scratch: Path
    process: int = 0
    pipe: int = -1
    buffer: bytes = b""
    case: int | None = None
    since: float = 0.0


def _start(worker: _Worker, seed: int, valid: Path, only: list[Target], quiet: bool) -> None:
    worker.pipe, other = os.pipe()
    worker.since, worker.case = time.monotonic(), None
    worker.process = os.fork()
    if worker.process == 0:
        code = 1
        try:
            os.close(worker.pipe)
            if quiet:  # Rust's panics and warnings of libraries
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
            _work(seed, worker.cases, valid, worker.scratch, only, other)
            code = 0
        finally:
            os._exit(code)
    os.close(other)


def _failed(worker: _Worker, why: str, records: list[dict]) -> None:
    records.append(
        {"case": worker.case, "target": "?", "edits": "", "outcome": "died", "problem": why}
    )
    worker.cases = [
        case for case in worker.cases if worker.case is not None and case != worker.case
    ]


def run(
    seed: int, cases: list[int], valid: Path, scratch: Path, only: list[Target], workers: int = 2
) -> list[dict[str, Any]]:
    """Use all cases; return a record of each."""
    records: list[dict[str, Any]] = []
    pool = [_Worker(cases[k::workers], scratch / str(k)) for k in range(workers)]
    for worker in pool:
        _start(worker, seed, valid, only, quiet=True)
    while running := [worker for worker in pool if worker.pipe >= 0]:
        ready, _, _ = select.select([worker.pipe for worker in running], [], [], 0.2)
        for worker in running:
            data = os.read(worker.pipe, 1 << 20) if worker.pipe in ready else b""
            worker.buffer += data
            *lines, worker.buffer = worker.buffer.split(b"\n")
            for record in map(json.loads, lines):
                worker.since = time.monotonic()
                worker.case = record.get("begin")
                if worker.case is None:
                    records.append(record)
                    worker.cases.remove(record["case"])
            ended = worker.pipe in ready and not data
            hangs = worker.case is not None and time.monotonic() - worker.since > SECONDS
            if not (ended or hangs):
                continue
            if hangs:
                os.kill(worker.process, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(worker.process, 0)[1])
            os.close(worker.pipe)
            worker.pipe, worker.buffer = -1, b""
            if worker.cases:
                _failed(
                    worker, f"hung for {SECONDS:g} s" if hangs else f"ended with {code}", records
                )
            if worker.cases:
                _start(worker, seed, valid, only, quiet=True)
    return sorted(records, key=lambda record: record["case"])


def main() -> int:
    """Run from the command line; the last line of the output is a JSON report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for inputs and outputs; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--case", type=int, help="only this one, here, with its traceback")
    parser.add_argument("--target", help="only this one")
    arguments = parser.parse_args()
    only = [t for t in targets() if arguments.target in (None, t.name)]
    _import_all()
    valid = arguments.folder / "valid"
    maker = os.fork()
    if maker == 0:
        code = 1
        try:
            make_valid(valid)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(maker, 0)[1]) == 0
    if arguments.case is not None:
        record = one_case(arguments.seed, arguments.case, valid, arguments.folder / "one", only)
        print(json.dumps(record, indent=1).replace("\\n", "\n"))
        return 0
    began = time.monotonic()
    records = run(
        arguments.seed, list(range(arguments.count)), valid, arguments.folder / "scratch", only
    )
    outcomes: dict[str, Counter] = {}
    for record in records:
        outcomes.setdefault(record["target"], Counter())[record["outcome"]] += 1
    report = {
        "seconds": round(time.monotonic() - began, 1),
        "cases": len(records),
        "outcomes": {name: dict(counts) for name, counts in sorted(outcomes.items())},
        "slowest": sorted((r.get("seconds", 0), r["case"]) for r in records)[-3:],
        "failures": [record for record in records if record["problem"]],
    }
    print(json.dumps(report))
    return 0


def _import_all() -> None:
    """Import what the targets use, so that a worker starts at once."""
    import importlib

    for name in (
        "mlx_slim.adapters.peft",
        "mlx_slim.adapters.stack",
        "mlx_slim.compare.matrix",
        "mlx_slim.compare.verify",
        "mlx_slim.data.pipeline",
        "mlx_slim.distillation.endpoint",
        "mlx_slim.evaluation.comparison",
        "mlx_slim.evaluation.tasks.prompts",
        "mlx_slim.models.convert",
        "mlx_slim.quantization.base",
        "mlx_slim.finetuning.run",
        "mlx_lm.models.llama",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.configuration_llama",
        "transformers.models.llama.tokenization_llama",
        "transformers.tokenization_utils_tokenizers",
        "gguf",
        "pyarrow.parquet",
    ):
        importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(main())
