"""Tests of ``mlx_slim/cluster``."""
