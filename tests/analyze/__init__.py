"""Tests of ``mlx_slim.analyze``."""
