"""``python -m mlx_slim`` is the command line. Try it: ``python -m mlx_slim --help``."""

from __future__ import annotations

from mlx_slim.cli.main import main

if __name__ == "__main__":
    main()
