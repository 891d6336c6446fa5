"""Tests of ``mlx_slim.blas``."""
