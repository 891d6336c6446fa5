"""Tests of ``mlx_slim.prune``."""
