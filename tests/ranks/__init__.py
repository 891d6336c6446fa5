"""Tests of ``mlx_slim/ranks/``."""
