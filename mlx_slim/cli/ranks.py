"""Which commands run over several ranks (``mlx.launch``), and what the others say.

Invariant: every command of ``main.COMMANDS`` is in one of the two tables; a command that wants one
rank ends on all of them before it reads or writes anything, with one line of rank 0. Try it:
``mlx.launch -n 2 --backend ring -- mlx-slim convert MODEL -o DIR``.
"""

from __future__ import annotations

import os

from mlx_slim.errors import SlimError

# Only rank 0 writes and prints; the work is divided.
OVER_RANKS = {
    "train": "rows of a step",
    "distill": "rows of a step, and what the teacher answers",
    "eval": "questions, or the model",
    "generate": "the model",
    "chat": "the model",
    "serve": "the model",
    "doctor": "compares the machines",
}
_CLUSTER = "start it without mlx.launch; its runs go to several machines with --cluster"
_ALONE = "start it without mlx.launch, on one machine"
# command -> what to do instead
ONE_RANK = {
    "demo": _ALONE,
    "recipes": _ALONE,
    "tasks": _ALONE,
    "data": _ALONE,
    "plan": "start it without mlx.launch; --machines N plans for several",
    "analyze": _ALONE,
    "convert": _ALONE,
    "quantize": _ALONE,
    "prune": _ALONE,
    "slim": _CLUSTER,
    "sweep": _CLUSTER,
    "compare": _CLUSTER,
    "worker": "start it without mlx.launch, once on each machine",
    "report": _ALONE,
    "bench": _ALONE,
    "fuse": _ALONE,
    "export": _ALONE,
    "import": _ALONE,
    "upload": _ALONE,
    "eval --compare": _ALONE,
    "doctor --self-test": _ALONE,
}
# Set by mlx.launch and by mpirun; a process without them is alone, and MLX need not be asked.
_LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def several_ranks() -> bool:
    """Return whether this process is one of several ranks; MLX is not imported for most that run.

    All ranks must call it: the first call connects them.
    """
    if not any(key in os.environ for key in _LAUNCHED):
        return False
    from mlx_slim import runtime

    return runtime.world().size() > 1


def check_ranks(name: str) -> None:
    """Refuse a command that wants one rank where there are several, and ranks that run several.

    The ranks connect here, before one of them reads its command line: a rank that ends because of
    it is noticed by the others, which else would wait for its connection without end.

    Args:
        name: A command, or one with an option that changes what it does.

    Raises:
        SlimError: On rank 0; the others end with its exit code and say nothing.
    """
    if not several_ranks():
        return
    from mlx_slim import runtime
    from mlx_slim.agreement import refuse_differences

    if name in ONE_RANK or name in OVER_RANKS:
        refuse_differences({"the command": name})
    if name not in ONE_RANK:
        return
    ranks = runtime.world().size()
    if not runtime.leads():
        raise SystemExit(SlimError.exit_code)
    raise SlimError(f"{name} runs in one process, here are {ranks} ranks", ONE_RANK[name])
