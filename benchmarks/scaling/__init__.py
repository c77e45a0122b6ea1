"""A model of steps on many GPUs."""
