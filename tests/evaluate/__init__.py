"""Tests of ``mlx_slim.evaluate``."""
