"""Commands as users type them."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


SMALL = ["--data.tile-px", "64", "--data.k", "10", "--model.encoder", "test_vit", "--memory.chunk", "16"]


SMALL += ["--data.classes", "wild_type", "mutant", "--model.no-pretrained"]


SMALL += ["--data.max-excluded", "0.2", "--model.dropout", "0", "--run.heatmaps", "1", "--run.precision", "fp32"]


# A launcher that has not ended by then hangs, also on a machine that is busy with other things.
PATIENCE_S = 1500


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": path}


def losses(folder: Path) -> list[float]:
    """Training losses, a step each, from TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.value for event in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]
