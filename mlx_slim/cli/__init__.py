"""The command line: one thin file a command, parse → config → workflow → print.

Invariant: a module here imports nothing heavy at its top (MLX, mlx_lm, transformers, datasets), so
that ``mlx-slim --help`` stays instant; each exposes its click command as ``command``. Try it:
``mlx-slim --help``.
"""
