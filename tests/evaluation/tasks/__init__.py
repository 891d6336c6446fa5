"""Tests of ``mlx_slim/evaluation/tasks/``."""
