"""Tests of ``mlx_slim.pruning``."""
