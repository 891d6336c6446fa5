"""Tests of ``mlx_slim/export/``."""
