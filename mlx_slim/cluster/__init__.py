"""Independent jobs, each a process of ``mlx-slim``, on this machine or on a Dask cluster."""
