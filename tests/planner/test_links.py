"""Links between machines: bytes, seconds, and whether a second machine helps."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mlx_slim.cli.plan import command
from mlx_slim.config.load import from_values
from mlx_slim.errors import SlimError
from mlx_slim.planner.links import (
    LINKS,
    SMALL_BYTES,
    SMALL_COLLECTIVES,
    Link,
    SeveralMachines,
    parse_link,
    several_machines,
    traffic,
)
from mlx_slim.planner.memory import Prediction
from mlx_slim.planner.time import Range


def test_a_link_is_named_or_measured() -> None:
    assert parse_link("TB4") is LINKS["tb4"]
    link = parse_link("110, 200")
    assert link.bandwidth == (110e6, 110e6)
    assert link.latency == pytest.approx((200e-6, 200e-6))
    assert str(link) == "110 MB/s, 200 µs"
    assert link.seconds(220_000_000, 10).low == pytest.approx(2.002)


@pytest.mark.parametrize("text", ["tb3", "110", "0,5", "-1,5", "1,2,3", "1e3,5", ""])
def test_no_link(text: str) -> None:
    with pytest.raises(SlimError, match="expected a link or MB/s,µs"):
        parse_link(text)


@pytest.mark.parametrize("link", LINKS.values())
def test_a_range_is_a_range(link: Link) -> None:
    (slow, fast), (short, long) = link.bandwidth, link.latency
    assert 0 < slow < fast and 0 < short < long


def test_bytes_of_a_step() -> None:
    # Two ranks: each sends half of the gradient to be summed, and half of the sum.
    small = SMALL_COLLECTIVES * SMALL_BYTES
    assert traffic(21_000_000, 2).sent == 4 * 21_000_000 + small
    assert traffic(21_000_000, 2).messages == 2 * 3 + SMALL_COLLECTIVES  # 84 MB in three buckets
    assert traffic(30, 3).sent == 160 + 2 * small


def planned(trainable: int, seconds: Range | None, link: str, machines: int = 2) -> SeveralMachines:
    recipe = from_values(
        {"model": "m", "data": {"path": "d"}, "train": {"steps": 10}}, "r", "t"
    ).recipe
    prediction = Prediction(
        predicted_peak_bytes=10**9,
        loading_peak_bytes=0,
        budget_bytes=2 * 10**9,
        fits=True,
        predicted_seconds=None,
        disk_bytes=0,
        download_bytes=0,
        breakdown={},
        parameters=10**9,
        trainable_parameters=trainable,
        dtype="bfloat16",
        tokens=40_960,
        tokens_basis="",
        rules_of_thumb={},
        time_range=seconds,
    )
    return several_machines(prediction, recipe, machines, parse_link(link))


def test_a_step_of_ten_seconds_and_a_link_of_two() -> None:
    several = planned(25_000_000, Range(100.0, 100.0), "50,0")  # 100 MB at 50 MB/s
    assert several.step_seconds == Range(10.0, 10.0)
    assert several.link_seconds.low == pytest.approx(2.0, rel=1e-4)
    assert several.speed_up is not None
    assert several.speed_up.low == pytest.approx(10 / (5 + 2), rel=1e-4)
    assert several.verdict == "helps"
    assert several.peak_bytes == 10**9 + 2 * 32 * 2**20


def test_when_it_does_not_help() -> None:
    assert planned(10**9, Range(100.0, 200.0), "wifi").verdict.startswith("does not help")
    assert planned(10**8, Range(50.0, 120.0), "1gbe").verdict.startswith("may help")
    assert planned(10**8, None, "1gbe").verdict.startswith("unknown")
    gain = planned(10**6, Range(100.0, 200.0), "tb5-rdma", machines=4).speed_up
    assert gain is not None and 3.9 < gain.low <= gain.high < 4.0


@pytest.mark.parametrize("machines", [1, 0, 65])
def test_how_many_machines(machines: int) -> None:
    with pytest.raises(SlimError, match="expected 2 to 64"):
        planned(10, None, "tb4", machines)


def test_the_command_prints_it() -> None:
    words = ["tinyllama-lora", "--for", "m2-16gb", "--machines", "2", "--link", "tb4"]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("machines", "  each"))]
    assert lines[0].startswith("machines       2 over tb4, 660 to 2,050 MB/s, 50 to 300 µs: ")
    assert "sends" in lines[1]
    done = CliRunner().invoke(command, [*words, "--json"], catch_exceptions=False)
    record = json.loads(done.stdout)["machines"]
    assert record["machines"] == 2
    trainable = json.loads(done.stdout)["trainable_parameters"]
    assert record["sent_bytes_per_step"] == traffic(trainable, 2).sent


def test_slices_need_less_memory_and_send_more() -> None:
    words = ["mistral-lora", "--for", "m4-max-128gb", "--machines", "2", "--link", "tb5"]
    whole, sliced = (
        json.loads(
            CliRunner().invoke(command, [*words, *more, "--json"], catch_exceptions=False).stdout
        )["machines"]
        for more in ([], ["train.shard=full"])
    )
    assert (whole["sharded"], sliced["sharded"]) == (False, True)
    assert sliced["predicted_peak_bytes"] < 0.75 * whole["predicted_peak_bytes"]
    assert sliced["sent_bytes_per_step"] > 100 * whole["sent_bytes_per_step"]
    assert sliced["speed_up"][1] < whole["speed_up"][0]


@pytest.mark.parametrize("words", [["--machines", "2"], ["--link", "tb4"]])
def test_one_needs_the_other(words: list[str]) -> None:
    with pytest.raises(SlimError, match="--machines and --link belong"):
        CliRunner().invoke(command, ["tinyllama-lora", *words], catch_exceptions=False)
