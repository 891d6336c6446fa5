"""Tests of ``mlx_slim/bench/``."""
