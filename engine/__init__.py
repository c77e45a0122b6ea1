"""The training engine: slides in, exact end-to-end gradients out."""
