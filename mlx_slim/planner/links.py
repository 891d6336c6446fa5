"""Links between machines, and what a step of training costs on them.

Invariant: a link is a range of bytes a second in each direction and of the latency of a message, in
which published measurements lie; nothing of it was measured here. Bytes are those of
``ranks/collectives.py``, in closed form; every machine holds the whole model and computes its part
of a step's rows. Try it: ``mlx-slim plan mistral-lora --machines 2 --link tb4 --for m2-max-64gb``.

Sources. Ethernet: a TCP segment of 1,448 bytes takes 1,538 on the wire, so 94% of 125 and 1,250
MB/s is the most. Wi-Fi: Apple lists 1,200 (M1) to 2,400 Mbit/s (M2 Pro, M3 and later) between a Mac
and an access point; half of that is payload at best, and two Macs on one access point share its
air: 20 to 90 MB/s; milliseconds. Thunderbolt 4: two ends negotiate 20 Gbit/s each way, TCP reached
16.4, and 5.3 with packets of the wrong size (jiribrejcha.net, May 2024). Thunderbolt 5: 80 Gbit/s;
TCP over it is counted as no slower than over Thunderbolt 4, and as half of the nominal rate at
most. A message over TCP takes up to 300 µs (as measured before RDMA: Apple's TN3205 names no
figure, its readers do). RDMA: 3.5 to 3.8 GB/s and about 5 µs reported for MLX's JACCL, 7.6 GB/s a
rank for another library (pytorch#189856), under 50 µs as Apple's users measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlx_slim.config.schema import Recipe
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.planner.memory import Prediction
from mlx_slim.planner.shapes import TrainingShapes
from mlx_slim.planner.time import Range
from mlx_slim.ranks.collectives import gathered_bytes, summed_bytes
from mlx_slim.reading import JsonObject
from mlx_slim.training.ranks import BUCKET

MOST_MACHINES = 64
_MEGA = 1e6  # bytes: rates are shown in the unit in which --link takes them
HELPS = 1.2  # times as fast: less is not worth a second machine
# A step also gathers its losses, whether a rank is to stop, and the speeds: each some bytes.
SMALL_COLLECTIVES, SMALL_BYTES = 3, 32


@dataclass(frozen=True)
class Link:
    """A link between two machines.

    Attributes:
        name: As ``--link`` takes it.
        bandwidth: Bytes a second each way: least, most.
        latency: Seconds of a message: least, most.
    """

    name: str
    bandwidth: tuple[float, float]
    latency: tuple[float, float]

    def seconds(self, sent: int, messages: int) -> Range:
        """Return how long a rank sends ``sent`` bytes in ``messages`` that wait for each other."""
        (slow, fast), (short, long) = self.bandwidth, self.latency
        return Range(sent / fast + messages * short, sent / slow + messages * long)

    def __str__(self) -> str:
        """Return the name with the ranges."""
        (slow, fast), (short, long) = self.bandwidth, self.latency
        rate = f"{slow / _MEGA:,.0f} to {fast / _MEGA:,.0f} MB/s"
        wait = f"{short * 1e6:,.0f} to {long * 1e6:,.0f} µs"
        if slow == fast and short == long:
            return f"{slow / _MEGA:,.0f} MB/s, {short * 1e6:,.0f} µs"
        return f"{self.name}, {rate}, {wait}"


LINKS = {
    link.name: link
    for link in (
        Link("wifi", (20e6, 90e6), (1e-3, 5e-3)),
        Link("1gbe", (100e6, 117e6), (50e-6, 300e-6)),
        Link("10gbe", (700e6, 1170e6), (30e-6, 300e-6)),
        Link("tb4", (660e6, 2050e6), (50e-6, 300e-6)),
        Link("tb5", (2050e6, 5000e6), (50e-6, 300e-6)),
        Link("tb5-rdma", (3500e6, 7600e6), (5e-6, 50e-6)),
    )
}


def parse_link(text: str) -> Link:
    """Return the link of a name, or of ``MB/s,µs``: ``110,200``.

    Raises:
        SlimError: If it is neither.
    """
    name = text.strip().lower()
    if name in LINKS:
        return LINKS[name]
    if measured := re.fullmatch(r"(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", name.replace(" ", "")):
        rate, wait = float(measured[1]) * _MEGA, float(measured[2]) * 1e-6
        if 1e3 <= rate <= 1e12 and wait <= 10:
            return Link(name, (rate, rate), (wait, wait))
    close = did_you_mean(name, LINKS)
    raise SlimError(
        f"--link is {text[:40]!r}, expected a link or MB/s,µs such as 110,200",
        close if close.startswith("did") else f"known: {', '.join(LINKS)}",
    )


@dataclass(frozen=True)
class Traffic:
    """What one machine sends in a step.

    Attributes:
        sent: Bytes.
        messages: That wait for each other.
    """

    sent: int
    messages: int


def traffic(trainable: int, machines: int) -> Traffic:
    """Return what a rank sends in a step whose gradients are summed in float32.

    Args:
        trainable: Numbers that are trained.
        machines: Ranks.
    """
    buckets = max(1, -(-4 * trainable // BUCKET))
    small = SMALL_COLLECTIVES * gathered_bytes(SMALL_BYTES, machines)
    return Traffic(
        summed_bytes(trainable, 4, machines) + small,
        2 * (machines - 1) * buckets + SMALL_COLLECTIVES * (machines - 1),
    )


def sharded_traffic(shapes: TrainingShapes, machines: int, micro_batches: int) -> Traffic:
    """Return what a rank sends in a step with ``train.shard=full``.

    Each micro-batch gathers the blocks twice (forward, backward), embedding and head once, and sums
    its gradients. Blocks are taken to be of the size of their weight matrices, and all weights of a
    model to be stored alike.

    Args:
        shapes: Of the model under the recipe.
        machines: Ranks.
        micro_batches: That each rank computes in a step.
    """
    fraction = sum(block.linear for block in shapes.blocks) / shapes.parameters
    inside = int(shapes.base_bytes * fraction) + shapes.adapter_bytes
    outside = shapes.base_bytes - int(shapes.base_bytes * fraction)
    gathered = gathered_bytes((2 * inside + outside) // machines, machines)
    summed = summed_bytes(shapes.trainable_parameters, 4, machines)
    # Large tensors travel alone: about seven matrices a block, gathered twice and summed once.
    messages = len(shapes.blocks) * (2 * 8 * (machines - 1) + 8 * 2 * (machines - 1))
    return Traffic(micro_batches * (gathered + summed), micro_batches * messages)


@dataclass(frozen=True)
class SeveralMachines:
    """A run on several machines.

    Attributes:
        machines: How many.
        link: Between them, as text.
        peak_bytes: Memory of each: as alone, and a bucket of gradients twice; or of its slice.
        sharded: Whether each holds a slice of the model.
        sent_bytes: What each sends in a step.
        link_seconds: Of a step, for that.
        step_seconds: Of a step on one machine; None where the rows cannot be counted.
        speed_up: How many times as fast as one machine; None likewise.
        verdict: Whether it helps, as text.
    """

    machines: int
    link: str
    peak_bytes: int
    sharded: bool
    sent_bytes: int
    link_seconds: Range
    step_seconds: Range | None
    speed_up: Range | None
    verdict: str

    def as_record(self) -> JsonObject:
        """Return the object of ``plan --json``."""

        def pair(one: Range | None) -> list[float] | None:
            return None if one is None else [one.low, one.high]

        return {
            "machines": self.machines,
            "link": self.link,
            "predicted_peak_bytes": self.peak_bytes,
            "sharded": self.sharded,
            "sent_bytes_per_step": self.sent_bytes,
            "link_seconds_per_step": pair(self.link_seconds),
            "step_seconds": pair(self.step_seconds),
            "speed_up": pair(self.speed_up),
            "verdict": self.verdict,
        }


def several_machines(
    prediction: Prediction,
    recipe: Recipe,
    machines: int,
    link: Link,
    sharded: tuple[Prediction, TrainingShapes] | None = None,
) -> SeveralMachines:
    """Return what ``machines`` alike make of a run that was predicted for one.

    Args:
        prediction: Of one of them.
        recipe: Of the run.
        machines: From 2.
        link: Between them.
        sharded: With ``train.shard=full``: the prediction of one of the ranks, and its shapes.

    Raises:
        SlimError: If the number cannot be used.
    """
    if not 2 <= machines <= MOST_MACHINES:
        raise SlimError(
            f"--machines is {machines:,}, expected 2 to {MOST_MACHINES}",
            "leave it out for one machine",
        )
    load = traffic(prediction.trainable_parameters, machines)
    if sharded is not None:
        load = sharded_traffic(sharded[1], machines, max(1, recipe.train.accumulate // machines))
    on_link, step = link.seconds(load.sent, load.messages), _step_seconds(prediction, recipe)
    gain = None
    if step is not None:
        gain = Range(
            1 / (1 / machines + on_link.high / step.low),
            1 / (1 / machines + on_link.low / step.high),
        )
    bucket = min(4 * prediction.trainable_parameters, BUCKET)
    peak = prediction.predicted_peak_bytes + 2 * bucket
    return SeveralMachines(
        machines=machines,
        link=str(link),
        peak_bytes=peak if sharded is None else sharded[0].predicted_peak_bytes,
        sharded=sharded is not None,
        sent_bytes=load.sent,
        link_seconds=on_link,
        step_seconds=step,
        speed_up=gain,
        verdict=_verdict(gain),
    )


def _step_seconds(prediction: Prediction, recipe: Recipe) -> Range | None:
    """Return the seconds of a step on one machine."""
    seconds = prediction.time_range
    if seconds is None and prediction.predicted_seconds is not None:
        seconds = Range(prediction.predicted_seconds, prediction.predicted_seconds)
    if seconds is None or not prediction.tokens:
        return None
    train = recipe.train
    steps = train.steps or prediction.tokens / (train.batch_tokens * train.accumulate)
    return seconds.scaled(train.duty / max(1.0, steps))


def _verdict(gain: Range | None) -> str:
    if gain is None:
        return "unknown: the rows of the recipe are not here to be counted"
    if gain.low >= HELPS:
        return "helps"
    if gain.high < HELPS:
        return "does not help: the link takes longer than the machines save; train on one"
    return "may help: measure the link with mlx-slim doctor --hosts, and give it as --link MB/s,µs"
