"""``mlx-slim doctor --hosts``: the machines of a host file, compared by one rank on each.

Invariant: the launcher's own exit code says nothing, so the record that rank 0 prints is what
counts; without one the command fails. Try it: ``mlx-slim doctor --hosts hosts.json``.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mlx_slim.cli.options import alive
from mlx_slim.errors import SlimError
from mlx_slim.progress import stage
from mlx_slim.reading import JsonObject, library_errors, short

SECONDS = 600.0  # of all ranks: models are hashed
_LAUNCH = "from mlx._distributed_utils.launch import main; main()"


def compare_hosts(
    hosts: Path | None, recipe: str | None, overrides: Sequence[str], as_json: bool
) -> int:
    """Compare the machines, print the result on one of them; return 1 if they differ.

    Args:
        hosts: The launcher's host file; None where this process is one of its ranks.
        recipe: Its model and rows are compared, too.
        overrides: ``KEY=VALUE`` of the recipe.
        as_json: Print the record.

    Raises:
        SlimError: If the file cannot be used, or the machines do not answer.
    """
    if hosts is None:
        from mlx_slim import runtime
        from mlx_slim.bench.link import compare_ranks

        record = compare_ranks(recipe, overrides)
        if runtime.leads():
            _show(record, as_json)
        return int(bool(record["differences"]))
    words = [*(["--recipe", recipe] if recipe is not None else []), *overrides]
    with alive(), stage(f"comparing the machines of {short(hosts)}"):
        record = _launched(hosts, words)
    _show(record, as_json)
    return int(bool(record["differences"]))


def _launched(hosts: Path, words: Sequence[str]) -> JsonObject:
    """Return the record of rank 0 of ``mlx-slim doctor`` on all hosts."""
    with library_errors(f"{short(hosts)} is no host file", "mlx.distributed_config writes one"):
        from mlx._distributed_utils.common import Hostfile

        file = Hostfile.from_file(str(hosts))
        for host in file.hosts:
            _check_host(host.ssh_hostname, host.ips, file.backend)
        machines = len(file.hosts)
    if machines < 2:
        raise SlimError(f"{short(hosts)} names {machines} hosts, expected 2 or more", "add one")
    doctor = [sys.executable, "-m", "mlx_slim", "doctor", "--json", *words]
    with socket.socket() as free:  # the default port may be that of a run
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-c", _LAUNCH, "--hostfile", str(hosts), "--starting-port", port]
    command = [*launch, "--", *doctor]
    # The launcher waits for its input to hand it on; one that has ended never lets it wait.
    quiet, held = os.pipe()
    try:
        done = subprocess.run(
            command, stdin=quiet, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise SlimError(
            f"the machines of {short(hosts)} did not answer in {SECONDS:.0f} s",
            "try ssh to each of them, and their firewalls; then mlx.launch --verbose",
        ) from error
    finally:
        os.close(quiet)
        os.close(held)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith('{"schema_version"'):
            return json.loads(line)
    lines = [line.strip()[:300] for line in done.stderr.splitlines() if line.strip()]
    raise SlimError(
        f"the machines of {short(hosts)} gave no answer",
        "every one needs this Python, mlx-slim, and ssh without a password",
        lines[-6:],
    )


def _check_host(name: Any, addresses: Any, backend: Any) -> None:
    """Check what the launcher hands to ssh and to the backend as it is.

    Raises:
        ValueError: If it is nothing that they can use.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[^\s-]\S*", name):
        raise ValueError(f"ssh is {name!r}, expected the name of a host")
    if not isinstance(addresses, list) or not all(isinstance(one, str) for one in addresses):
        raise ValueError(f"ips of {name} is {addresses!r}, expected a list of addresses")
    for one in addresses:
        ipaddress.ip_address(one)
    if backend in ("", "ring") and not addresses:
        raise ValueError(f"ips of {name} is empty, expected the addresses that the ring listens on")


def _show(record: JsonObject, as_json: bool) -> None:
    """Print what the machines are, what differs, and what their link does."""
    if as_json:
        click.echo(json.dumps(record))
        return
    from mlx_slim.units import human_bytes, human_duration

    for one in record["ranks"]:
        device = one["device"]
        click.echo(f"rank {one['rank']}: {one['host']}, {device['type']}, {device['name']}")
    link = record["link"]
    rate, latency = link["megabytes_per_second"], link["latency_us"]
    plan = f"mlx-slim plan RECIPE --machines {len(record['ranks'])} --link {rate:.0f},{latency:.0f}"
    click.echo(f"link: {rate:,.0f} MB/s, {latency:,.0f} µs ({plan})")
    if link["gradient_bytes"] is not None:
        size, seconds = link["gradient_bytes"], human_duration(link["gradient_seconds"])
        click.echo(f"all-reduce of the gradients of a step: {human_bytes(size)} in {seconds}")
    for one in record["differences"]:
        click.echo(f"differs: {one['fact']}: {one['values']}")
    if not record["differences"]:
        shared = record["ranks"][0]["facts"]
        click.echo(f"the same everywhere: {', '.join(shared)}")
