"""Whole tasks, each prepare → run → save → verify: what a command calls, and compare repeats.

Invariant: a workflow takes plain settings and observers, prints nothing, and leaves either a whole
result or nothing. Try it: ``mlx-slim generate MODEL --prompt TEXT`` (``workflows.talk``).
"""
