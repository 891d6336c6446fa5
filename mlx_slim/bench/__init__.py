"""Side-by-side benchmarks against mlx-lm, each side in its own process."""
