"""Sizes of networks that are only there to be tested."""

# Of a vision transformer that is as deep and wide as a test needs.
NARROW = {"depth": 2, "embed_dim": 48, "num_heads": 4}
