"""Collectives of real ranks: their results, their bytes and the time in them."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_slim.interrupts import finished_first
from mlx_slim.ranks import collectives
from mlx_slim.ranks.collectives import gathered_bytes, lost_peer, summed_bytes
from mlx_slim.ranks.state import CollectiveState, resume_hint, resumed_by, state
from tests.support.runs import run_script

RANKS = """
import json, os, socket, sys, time
from pathlib import Path
import mlx.core as mx
from mlx_slim.ranks import collectives, watch
from mlx_slim.ranks.state import state
from mlx_slim.runtime import all_gather_bytes, all_sum, true_on_all_ranks, world
from mlx_slim.training.ranks import sum_gradients

group, facts = world(), {}
rank = group.rank()

def on_the_wire():  # bytes of all connections to other ranks, those sent twice not counted
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as stream:
                info = stream.getsockopt(socket.IPPROTO_TCP, 11, 256)
        except OSError:
            continue
        sent, again = (int.from_bytes(info[at : at + 8], "little") for at in (200, 208))
        total += sent - again
    return total

tensors = {"b": mx.ones((3, 5)) * rank, "a": mx.arange(2_000_000) * 1.0, "c": mx.ones((7,))}
before = on_the_wire() if sys.platform == "linux" else None
sums = sum_gradients(tensors, bucket=4_000_000)
facts["emptied"] = tensors == {}
right = mx.array_equal(sums["a"], mx.arange(2_000_000) * 1.0 * group.size())
facts["sums"] = [sums["b"].tolist(), right.item(), sums["c"].shape]
facts["sent"] = state.sent["gradients"]
if before is not None:
    facts["wire"] = on_the_wire() - before
facts["gathered"] = [row.decode() for row in all_gather_bytes(b"x" * (rank + 1))]
waited = state.waited
if rank == 0:
    time.sleep(0.5)
facts["sum"] = all_sum(mx.array(rank + 1)).item()
facts["waited"] = state.waited - waited
facts["number"] = state.number
facts["all"] = [true_on_all_ranks(True), true_on_all_ranks(rank == 0)]
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(facts))
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_bytes_and_waiting(tmp_path: Path, ranks: int) -> None:
    done = run_script(RANKS, tmp_path, ranks=ranks)
    assert len(list(tmp_path.glob("*.json"))) == ranks, done.stderr
    facts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    total = sum(range(ranks))
    for one in facts:
        assert one["sums"] == [[[float(total)] * 5] * 3, True, [7]]
        assert one["gathered"] == ["x" * (rank + 1) for rank in range(ranks)]
        assert (one["sum"], one["emptied"]) == (total + ranks, True)
        assert one["number"] == facts[0]["number"]
        assert one["all"] == [True, False]
        # a alone is larger than a bucket; b and c travel in one.
        expected = summed_bytes(2_000_000, 4, ranks) + summed_bytes(15 + 7, 4, ranks)
        assert one["sent"] == expected
        if "wire" in one:  # the kernel counts heartbeats too
            assert one["sent"] - 64 <= one["wire"] <= one["sent"] + 16 * 64 * ranks
    waits = [one["waited"] for one in facts]
    assert min(range(ranks), key=waits.__getitem__) == 0, "the others wait for the one that is late"
    assert min(waits[1:]) > 0.3 > waits[0]


def test_one_rank_sends_nothing_and_gets_back_what_it_gave() -> None:
    group, before = mx.distributed.init(), (state.number, dict(state.sent))
    array = mx.ones((3,))
    assert collectives.all_sum(array, group, "sums") is array
    assert collectives.all_gather(array, group, "sums") is array
    assert (state.number, dict(state.sent)) == before


def test_bytes_of_a_sum_and_of_a_gathering() -> None:
    assert summed_bytes(12, 4, 2) == 48  # 6 numbers go, 6 sums come and 6 go on
    assert summed_bytes(10, 4, 3) == 4 * 4 * 4  # slices of 4, 4 and 2 numbers
    assert gathered_bytes(100, 4) == 300
    assert summed_bytes(5, 4, 1) == gathered_bytes(100, 1) == 0


def test_only_an_error_of_the_backend_is_about_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "_VERDICT_SECONDS", 0.0)
    lost = lost_peer(RuntimeError("[ring] connection to a peer was lost"))
    assert lost is not None and lost.exit_code == 1 and "connection to a peer was lost" in str(lost)
    assert lost_peer(RuntimeError("[malloc] Unable to allocate 5 bytes")) is None
    assert lost_peer(ValueError("[ring] no such thing")) is None


def test_seconds_in_a_collective() -> None:
    here = CollectiveState()
    assert here.seconds(1e9) == 0.0
    with here.collective():
        assert here.since is not None and here.seconds(here.since + 3) == 3.0
    with here.collective(patient=True):
        assert here.seconds(1e9) == -1.0
    with finished_first():
        assert here.seconds(1e9) == -1.0
        with here.collective():
            assert here.since is not None and here.seconds(here.since + 1) == 1.0
    assert here.seconds(1e9) == 0.0
    assert (here.number, here.since) == (3, None)
    assert here.waited > 0


def test_the_hint_is_the_innermost_command_and_never_fails() -> None:
    assert resume_hint() == "start the command again"
    with resumed_by(lambda: "outer"):
        assert resume_hint() == "resume with: outer"
        with resumed_by(lambda: ""):
            assert resume_hint() == "start the command again"
        with resumed_by(lambda: str(1 // 0)):
            assert resume_hint() == "start the command again"
    assert resume_hint() == "start the command again"
