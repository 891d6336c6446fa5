"""Tests of mlx_slim.adapters."""
