"""Tests of ``mlx_slim/planner/``."""
