"""What the ranks of one command tell each other before they compute.

Invariant: every function here is called by all ranks in the same order; a failure of one rank ends
all of them, and one of them says why. One rank pays nothing. Try it:
``mlx.launch -n 2 --backend ring -- mlx-slim eval MODEL --task openbookqa --limit 8 -o OUT``.
"""

from __future__ import annotations

import json
import re
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mlx_slim import runtime
from mlx_slim.errors import SlimError
from mlx_slim.reading import JsonObject

_T = TypeVar("_T")
_MOST_DIFFERENCES = 6


def gather(value: Any, *, patient: bool = False) -> list[Any]:
    """Return what every rank gave (JSON), in the order of ranks.

    ``patient``: a rank may work alone for long before it comes.
    """
    data = json.dumps(value).encode()
    return [json.loads(one) for one in runtime.all_gather_bytes(data, patient=patient)]


def first(value: Any, *, patient: bool = False) -> Any:
    """Return rank 0's ``value`` (JSON) on every rank; ``patient`` as in ``gather``."""
    return gather(value, patient=patient)[0]


def on_every_rank(work: Callable[[], _T]) -> _T:
    """Return ``work()`` where it holds on every rank; else the ranks end.

    Raises:
        SlimError: On the first rank where ``work`` failed, as there; the others end with its exit
            code and say nothing.
    """
    failure: SlimError | None = None
    done: list[_T] = []
    try:
        done.append(work())
    except SlimError as error:
        failure = error
    rows = gather([failure.exit_code, failure.message] if failure else [0, ""], patient=True)
    failed = [rank for rank, (code, _) in enumerate(rows) if code]
    if not failed:
        return done[0]
    if failure is not None and runtime.world().rank() == failed[0]:
        if len({message for _, message in rows}) > 1:  # else it is the same everywhere
            failure.message = named(failure.message)
        raise failure
    raise SystemExit(rows[failed[0]][0])


def named(message: str) -> str:
    """Return ``message`` with the rank and the machine that it is of, where there are several."""
    group = runtime.world()
    return message if group.size() == 1 else f"rank {group.rank()} ({machine()}): {message}"


def machine() -> str:
    """Return the name of this machine."""
    return socket.gethostname() or "a machine without a name"


def rank_memory(memory: int) -> int:
    """Return the bytes that each rank can have: the least over all of them.

    Args:
        memory: Of this machine; ranks on one machine divide it.
    """
    rows = gather([machine(), memory])
    ranks_on = Counter(name for name, _ in rows)
    return min(size // ranks_on[name] for name, size in rows)


def refuse_differences(facts: Mapping[str, Any]) -> None:
    """Refuse ranks that would not compute the same.

    Args:
        facts: What must be equal on every rank: names for people, values as JSON.

    Raises:
        SlimError: On rank 0, with each fact that differs and the ranks that have each value; the
            others end with its exit code.
    """
    rows: list[JsonObject] = gather(dict(facts))
    problems = differences(rows)
    if not problems:
        return
    if runtime.world().rank() != 0:
        raise SystemExit(SlimError.exit_code)
    raise SlimError(
        f"the ranks disagree on {', '.join(name for name, _ in problems)}",
        "mlx-slim doctor --hosts HOSTFILE compares the machines",
        [f"{name}: {text}" for name, text in problems[:_MOST_DIFFERENCES]],
    )


def differences(rows: list[JsonObject]) -> list[tuple[str, str]]:
    """Return (name, who has what) of each fact that is not the same in all ``rows``.

    Args:
        rows: Facts of each rank, in the order of ranks; one that is absent counts as ``None``.
    """
    problems = []
    for name in dict.fromkeys(key for row in rows for key in row):
        values: dict[str, list[int]] = {}
        for rank, row in enumerate(rows):
            value = row.get(name)
            text = value if isinstance(value, str) else json.dumps(value)
            values.setdefault(_short(text), []).append(rank)
        if len(values) > 1:
            problems.append((name, "; ".join(f"{_ranks(who)} {v}" for v, who in values.items())))
    return problems


def _short(text: str) -> str:
    return text[:12] if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}:"
