"""A real run on two ranks, of which one has no room on its disk: what each says, and what is left.

Ranks that are killed, stopped and late are in ``test_watch.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

from mlx_slim import locks
from tests.support.ranks import ended, started_ranks
from tests.support.runs import write_rows
from tests.support.tiny import TinyModels

# Rank 0 may write no file as large as the optimizer's state: a disk that becomes full.
TRAIN = """
import os, resource, signal, sys
if os.environ["MLX_RANK"] == "0" and sys.argv[1] == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.dont_write_bytecode = True  # or other processes would read what is cut off
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
from mlx_slim.cli.main import main
sys.argv = ["mlx-slim", *sys.argv[2:]]
main()
"""


def test_a_full_disk_ends_both_ranks_with_a_line_each_and_the_run_resumes(
    tiny: TinyModels, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "run", tmp_path / "recipe.json"
    values = {
        "model": str(tiny("llama")),
        "data": {"path": str(write_rows(tmp_path / "rows.jsonl")), "validation": 4},
        "report_answers": 0,
        "adapter": {"rank": 32},
        "train": {"steps": 6, "batch_tokens": 256, "max_length": 128},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values))
    words = ["train", recipe, "train.save_every=2", "--quiet", "-o", out]
    with started_ranks(tmp_path, 2, TRAIN, "full", *words) as processes:
        first, second = map(ended, processes)
    assert first[0] == 3 and "a file may have at most 60,000 bytes in this shell" in first[1][0]
    line = "error: rank 0 of 2 ended with exit code 3; its message says why; "
    code, (told,) = second
    assert code == 1 and told.startswith(line + "resume with: mlx-slim train ")
    assert told.endswith(f"train.save_every=2 -o {out} --resume")
    assert not (out / "run.json").exists()
    assert not [path for path in out.rglob("*") if locks.is_temporary(path.name)]
    with started_ranks(tmp_path, 2, TRAIN, "free", *words, "--resume") as processes:
        ends = [ended(process) for process in processes]
    assert ends == [(0, []), (0, [])]
    assert json.loads((out / "run.json").read_text())["status"] == "complete"
