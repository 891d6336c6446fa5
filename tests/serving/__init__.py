"""Tests of ``mlx_slim.serving``."""
