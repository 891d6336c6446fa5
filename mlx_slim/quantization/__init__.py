"""Quantization of whole models: which layer gets which bits, and the methods of mlx-lm."""
