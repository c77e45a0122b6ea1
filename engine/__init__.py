"""The training engine: slides in, exact end-to-end gradients out.

As a library: a model of an encoder and an aggregator, `make_step`, and bags of tiles; see docs/library.md.
"""

import importlib
from typing import TYPE_CHECKING, Any

from slidescale.engine.process import launcher  # noqa: F401  (see there why so early)

if TYPE_CHECKING:
    from slidescale.engine.api import SlideStep as SlideStep
    from slidescale.engine.api import make_step as make_step
    from slidescale.engine.config import Config as Config
    from slidescale.engine.memory.two_pass import Chunks as Chunks
    from slidescale.engine.memory.two_pass import aggregate as aggregate
    from slidescale.engine.memory.two_pass import backpropagate as backpropagate
    from slidescale.engine.memory.two_pass import encode as encode
    from slidescale.engine.models.gathered import Gathered as Gathered
    from slidescale.engine.models.slide_model import SlideModel as SlideModel
    from slidescale.engine.parallel.mesh import Mesh as Mesh
    from slidescale.engine.parallel.mesh import join as join
    from slidescale.engine.parallel.mesh import stop_world as stop_world
    from slidescale.engine.run import run as train  # noqa: F401
    from slidescale.engine.training.bags import Bag as Bag

# The face, and where each name lives (after a colon, what it is called there): imported when it is asked for, for
# PyTorch takes seconds.
_FACE = {
    "Bag": "training.bags",
    "Chunks": "memory.two_pass",
    "Config": "config",
    "Gathered": "models.gathered",
    "Mesh": "parallel.mesh",
    "SlideModel": "models.slide_model",
    "SlideStep": "api",
    "aggregate": "memory.two_pass",
    "backpropagate": "memory.two_pass",
    "encode": "memory.two_pass",
    "join": "parallel.mesh",
    "make_step": "api",
    "stop_world": "parallel.mesh",
    "train": "run:run",
}
__all__ = sorted(_FACE)


def __getattr__(name: str) -> Any:
    """A name of the face (PEP 562)."""
    if name not in _FACE:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    module, _, original = _FACE[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), original or name)


def __dir__() -> list[str]:
    """The face."""
    return sorted(_FACE)
