"""Tests of ``mlx_slim.sweeping``."""
