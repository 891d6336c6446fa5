"""Tests of ``mlx_slim.quantization``."""
