"""Tests of ``mlx_slim.quantize``."""
