"""Kinds of machine: chip, cores, memory and versions, in words."""

from __future__ import annotations

from mlx_slim.cluster.machines import kind_of, machine


def test_this_machine_has_a_kind() -> None:
    here = machine()
    assert " CPU core" in here["machine"]
    assert kind_of(here).startswith(f"{here['machine']}; Python {here['python']}, ")
    other = {**here, "versions": {**here["versions"], "mlx": "0"}}
    assert kind_of(other) != kind_of(here)
    assert kind_of({"system": "Darwin arm64"}) == "Darwin arm64; Python ?"
