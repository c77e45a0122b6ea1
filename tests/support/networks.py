"""Networks that are only there to be tested, and their sizes."""

from typing import Any

from torch import nn

# Of a vision transformer that is as deep and wide as a test needs.
NARROW = {"depth": 2, "embed_dim": 48, "num_heads": 4}


class Unused(nn.Module):
    """In the place of an aggregator, where a test looks at the encoder alone."""

    def forward(self, features: Any, places: Any, group: Any) -> Any:
        raise AssertionError("it is not to be called")
