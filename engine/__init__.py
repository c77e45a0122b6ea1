"""The training engine: slides in, exact end-to-end gradients out."""

from slidescale.engine.process import launcher  # noqa: F401  (see there why so early)
