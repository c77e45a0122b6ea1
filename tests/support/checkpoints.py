"""Checkpoints of a model of two layers."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.strategies.strategy import SingleStrategy, Strategy
from slidescale.engine.training.checkpoint import Checkpoints, Progress
from slidescale.engine.training.history import EpochTotals

from support.runs import CPU


def progress(epoch: int) -> Progress:
    return Progress(
        epoch=epoch, step=5 * epoch, slides_a_step=1, excluded={"a": "é"}, unreported=EpochTotals([0.1, 0.2], 3)
    )


class Small(nn.Module):
    """Two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.aggregator = nn.Linear(50, 20), nn.Linear(20, 2)


def small_strategy() -> SingleStrategy:
    model: Any = Small()
    return SingleStrategy(model, torch.optim.SGD(model.parameters(), lr=0.1), None, device=CPU, clip=0)


def fill(strategy: Strategy, value: float) -> None:
    """Make all parameters `value`, as an epoch would make them something."""
    with torch.no_grad():
        for parameter in strategy.model.parameters():
            parameter.fill_(value)


def filled(strategy: Strategy) -> float:
    """What `fill` was given."""
    values = {float(value) for parameter in strategy.model.parameters() for value in parameter.detach().unique()}
    assert len(values) == 1
    return values.pop()


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def two_checkpoints(folder: Path) -> tuple[SingleStrategy, Checkpoints]:
    strategy, checkpoints = small_strategy(), Checkpoints(folder / "checkpoints", RankGroup())
    for epoch in (1, 2):
        fill(strategy, epoch)
        checkpoints.save(strategy, progress(epoch))
    return strategy, checkpoints
