"""Tests of ``mlx_slim.slimming``."""
