"""Models: loading, conversion, saving, and the one place that knows how they are built."""
