"""``docs/machines.md``, made from the records of ``mlx-slim bench suite`` in ``bench/results/``.

Invariant: every figure on the page stands in a record; a test holds the page up to date. Try it:
``python docs/machines.py`` writes it again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_slim.artifacts import write_text
from mlx_slim.units import human_bytes, human_duration

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "machines.md"
HEAD = """# Machines

What `mlx-slim bench suite` measured, a column a machine: [how to send yours](#send-yours).
Made from `bench/results/` by `python docs/machines.py`: add a record, not a line.
"""
TAIL = """## What was measured

- **The self-test** (`mlx-slim doctor --self-test` runs it alone): a random model of 5 million
  parameters is trained and scored on the default device in its default dtype, and compared with the
  plain computation: dense weights, float32, on the CPU, one row at a time, full logits. A figure is
  the largest relative difference unless it has a unit.
- **Speeds** are those of SmolLM2-135M-Instruct, whose weights the package index has, each in a
  process of its own: an epoch of 32 rows of the demo by four methods, the first step not timed;
  three tasks over the demo's rows (`category`: eight examples shared by all questions; `line`:
  answers of many tokens; `demo_exact_match`: generated answers); an answer of 48 tokens to a short
  prompt, in 4 bits.

A machine that is used for something else meanwhile is slower: compare figures within a column.

## Send yours

<!-- needs: time -->
```bash
mlx-slim bench suite -o bench/results/my-machine.json
python docs/machines.py
```

The record names the chip, its memory, the versions and the figures: no user, no host, no path.
"""


def records(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the records of all machines, in the order of their files' names.

    Those of ``doctor --self-test`` have no speeds.
    """
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


def _table(rows: list[list[str]]) -> str:
    head, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def _figure(check: dict[str, Any] | None) -> str:
    """Return what a machine measured, and whether it is off."""
    if check is None:
        return "–"
    value, mark = check["measured"], {"off": " **off**", "skipped": " skipped"}
    figure = "–" if value is None else f"{value:,.2g}" if value < 100 else f"{value:,.0f}"
    return f"{figure} {check['unit']}".rstrip() + mark.get(check["status"], "")


def _speeds(suite: dict[str, Any]) -> dict[str, str]:
    """Return name of a measurement -> figure."""
    lines = {
        f"train, {method}": f"{each['tokens_per_second']:,.0f} tokens/s, "
        f"{human_bytes(each['peak_memory_bytes'])}"
        for method, each in suite["train"].items()
    }
    lines |= {
        f"eval, {task}": f"{each['questions_per_second']:.2g} questions/s"
        for task, each in suite["eval"].items()
    }
    return lines | {"generate": f"{suite['generation']['tokens_per_second']:,.1f} tokens/s"}


def page(machines: list[dict[str, Any]]) -> str:
    """Return the page of these records."""
    names = [one["machine"]["device"] for one in machines]
    facts = {
        "cores": [str(device["cores"]) for device in names],
        "memory": [human_bytes(one["machine"]["memory_bytes"]) for one in machines],
        "device, dtype": [f"{device['type']}, {device['dtype']}" for device in names],
        "system": [one["machine"]["system"] for one in machines],
        "MLX": [one["machine"]["versions"]["mlx"] for one in machines],
        "matmul": [
            f"{one['machine']['speed']['matmul_float32_gflops']:,.0f} GFLOP/s float32"
            for one in machines
        ],
        "self-test": ["ok" if one["ok"] else "**off**" for one in machines],
        "time of all": [human_duration(one["seconds"]) for one in machines],
    }
    head = ["", *(device["name"] for device in names)]
    speeds = [_speeds(one["suite"]) if "suite" in one else {} for one in machines]
    checks = [{check["check"]: check for check in one["checks"]} for one in machines]
    return (
        "\n\n".join(
            [
                HEAD.rstrip(),
                _table([head, *([name, *values] for name, values in facts.items())]),
                "## Speed",
                _table([head, *_across(speeds, lambda figure: figure or "–")]),
                "## Self-test",
                _table([head, *_across(checks, _figure)]),
                TAIL.rstrip(),
            ]
        )
        + "\n"
    )


def _across(columns: list[dict[str, Any]], show: Any) -> list[list[str]]:
    """Return a line for each name in any of the columns, in the order of the first that has it."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(show(column.get(name)) for column in columns)] for name in names]


if __name__ == "__main__":
    write_text(PAGE, page(records()))
