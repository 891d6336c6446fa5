"""A model larger than a machine is trained in slices, one on each rank."""
