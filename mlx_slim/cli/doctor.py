"""``mlx-slim doctor``: device, speed and problems of this machine; whether it computes right.

Invariant: without ``--self-test`` it reads and measures for a few seconds and writes nothing; every
warning has a remedy. ``--json`` has the same facts under stable names. Try it: ``mlx-slim doctor``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import click

from mlx_slim.bench.machine import device, speed, total_memory
from mlx_slim.cli.measurements import measured
from mlx_slim.cli.options import alive, show_next
from mlx_slim.cli.ranks import check_ranks, several_ranks
from mlx_slim.next_steps import step
from mlx_slim.progress import stage
from mlx_slim.reading import JsonObject

SLOW_GFLOPS = 25.0  # float32 on a CPU: the reference BLAS gives 2-5, OpenBLAS 50 and more a core


def hub() -> JsonObject:
    """Return the hub's state: ``reachable``, ``unreachable`` or ``offline by choice``."""
    from huggingface_hub import constants

    from mlx_slim import runtime

    answer: JsonObject = {"endpoint": constants.ENDPOINT}
    if constants.is_offline_mode():
        return {**answer, "state": "offline by choice"}
    if trouble := runtime.hub_error():
        return {**answer, "state": "unreachable", "why": trouble}
    return {**answer, "state": "reachable"}


def data_mirror() -> JsonObject:
    """Return the folder of ``MLX_SLIM_DATA`` and its data sets (``<name>/<split>.jsonl``)."""
    value = os.environ.get("MLX_SLIM_DATA", "")
    folder = Path(value).expanduser()
    exists = value != "" and folder.is_dir()
    names = sorted({file.parent.name for file in folder.glob("*/*.jsonl*")}) if exists else []
    return {"folder": value or None, "found": exists, "datasets": names}


def compiler() -> JsonObject:
    """Return the C++ compiler that ``mx.compile`` calls on a Linux CPU."""
    needed = sys.platform.startswith("linux")
    return {"needed": needed, "path": shutil.which("g++") if needed else None}


def examine() -> JsonObject:
    """Return all facts, and ``warnings`` as a list of ``problem`` and ``mend``."""
    from mlx_slim import artifacts, blas, runtime

    status = blas.status()
    facts: JsonObject = {
        "schema_version": artifacts.SCHEMA_VERSION,
        "device": device(),
        "memory": {
            "total_bytes": total_memory(),
            "available_bytes": runtime.device_memory(),
            "budget_bytes": runtime.memory_budget("auto"),
        },
        **artifacts.provenance(),
        "blas": {"source": status.source, "library": status.path, "note": status.note},
        "speed": speed(),
        "compiler": compiler(),
        "hub": hub(),
        "data": data_mirror(),
    }
    facts["warnings"] = [{"problem": problem, "mend": mend} for problem, mend in _warnings(facts)]
    return facts


def _warnings(facts: JsonObject) -> list[tuple[str, str]]:
    """Return (problem, what to do) of each problem."""
    problems = []
    rate, blas = facts["speed"]["matmul_float32_gflops"], facts["blas"]
    if facts["device"]["type"] == "cpu" and rate < SLOW_GFLOPS:
        mend = {
            "off": "unset MLX_SLIM_BLAS",
            "late": blas["note"],
            "none": blas["note"] if "cannot" in blas["note"] else "pip install scipy-openblas32",
        }.get(blas["source"], "check whether other programs use the cores (uptime)")
        problems.append((f"float32 matmul runs at {rate:g} GFLOP/s, which is slow", mend))
    elif blas["note"] and blas["source"] not in ("off", "platform"):
        problems.append(("another BLAS than the default is in use", blas["note"]))
    if facts["compiler"]["needed"] and facts["compiler"]["path"] is None:
        problems.append(
            ("no g++: compiled functions run uncompiled", "install g++ (build-essential)")
        )
    if facts["hub"]["state"] == "unreachable":
        mend = "give local folders as models, or set HF_ENDPOINT; HF_HUB_OFFLINE=1 disables it"
        problems.append((f"{facts['hub']['endpoint']} does not answer", mend))
    if facts["data"]["folder"] and not facts["data"]["found"]:
        problem = f"MLX_SLIM_DATA={facts['data']['folder']} is not a folder"
        problems.append((problem, "name a folder that holds <dataset>/<split>.jsonl"))
    return problems


def _rows(facts: JsonObject) -> list[tuple[str, str]]:
    """Return (name, value) lines of the table."""
    from mlx_slim.units import human_bytes

    device, memory, rates = facts["device"], facts["memory"], facts["speed"]
    hub_line = f"{facts['hub']['endpoint']}: {facts['hub']['state']}"
    mirror = facts["data"]
    rows = [
        ("device", f"{device['type']}, {device['name']}, {device['cores']} cores"),
        ("system", f"{facts['system']}, Python {facts['python']}"),
        (
            "memory",
            f"{human_bytes(memory['total_bytes'])}, free for MLX "
            f"{human_bytes(memory['available_bytes'])}, "
            f"default budget {human_bytes(memory['budget_bytes'])}",
        ),
        ("default dtype", device["dtype"]),
        ("matmul float32", f"{rates['matmul_float32_gflops']:,g} GFLOP/s"),
        ("matmul bfloat16", f"{rates['matmul_bfloat16_gflops']:,g} GFLOP/s"),
        ("exponential", f"{rates['exp_ns']:g} ns an element"),
        ("BLAS", _blas_line(facts["blas"])),
        ("hub", hub_line),
        (
            "data mirror",
            f"{mirror['folder']}: {', '.join(mirror['datasets']) or 'no data sets'}"
            if mirror["found"]
            else "none (MLX_SLIM_DATA)",
        ),
        ("versions", ", ".join(f"{name} {v}" for name, v in facts["versions"].items())),
    ]
    if facts["compiler"]["needed"]:
        rows.insert(-3, ("compiler", facts["compiler"]["path"] or "none"))
    return rows


def _blas_line(blas: JsonObject) -> str:
    if blas["library"]:
        return f"{blas['source']}: {blas['library']}"
    if blas["source"] == "platform":
        return "MLX's own (Accelerate, Metal)"
    return f"MLX's own ({blas['note']})"


@click.command(epilog="Example: mlx-slim doctor")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--hosts",
    type=click.Path(path_type=Path),
    help="Compare the machines of this host file of mlx.launch, and measure their link.",
)
@click.option("--recipe", metavar="NAME", help="Compare its model and rows, too.")
@click.option("--self-test", is_flag=True, help="Check (in minutes) that results here are correct.")
@click.option("--json", "as_json", is_flag=True, help="Print the facts, or the checks, as JSON.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File for the record of --self-test, without names and paths.",
)
def command(
    overrides: tuple[str, ...],
    hosts: Path | None,
    recipe: str | None,
    self_test: bool,
    as_json: bool,
    output: Path | None,
) -> int:
    """Check this machine (device, memory, speed, hub) and say what to fix.

    With --self-test a small random model is trained and scored on the default device, and compared
    with the plain computation in float32 on the CPU; the exit code is 1 if a check fails.

    With --hosts, or started by mlx.launch, several machines are compared: versions, and the model
    and rows of a recipe; the exit code is 1 if they differ.
    """
    if self_test:
        check_ranks("doctor --self-test")
        from mlx_slim.bench import self_test as test

        return measured(test.self_test, output, as_json)
    if output is not None:
        raise click.UsageError("-o is for the record of --self-test")
    if overrides and recipe is None:
        raise click.UsageError("KEY=VALUE changes a recipe: name it with --recipe")
    if hosts is not None or several_ranks():
        from mlx_slim.cli.hosts import compare_hosts

        return compare_hosts(hosts, recipe, overrides, as_json)
    if recipe is not None:
        raise click.UsageError("--recipe is for several machines: add --hosts FILE")
    _show_facts(as_json)
    return 0


def _show_facts(as_json: bool) -> None:
    """Examine the machine and print what is there and what is wrong."""
    with alive(), stage("measuring this machine and contacting the hub"):
        facts = examine()
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        if console.is_terminal:
            table.add_row(name, Text(value))
        else:
            click.echo(f"{name}: {value}")
    if console.is_terminal:
        console.print(table)
    for warning in facts["warnings"]:
        line = Text.assemble(("warning: ", "yellow"), warning["problem"])
        console.print(line.append("\n  fix: ", "green").append(warning["mend"]), soft_wrap=True)
    if not facts["warnings"]:
        console.print(Text("all is well", style="green"))
    show_next(
        step("see it work", "mlx-slim", "demo"),
        step("choose a recipe", "mlx-slim", "recipes"),
    )
