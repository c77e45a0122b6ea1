"""Learning rate and weight decay of each parameter group, step by step, where ds.json names no scheduler."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from slidescale.engine.config import Config, OptimConfig
from slidescale.engine.strategies.strategy import is_frozen


@dataclass(frozen=True)
class Schedule:
    """Lengths that schedules are made of, in optimizer steps.

    Attributes:
        warmup_steps: of the aggregator, and of the encoder once it trains.
        total_steps: of the run.
        frozen_steps: at the start, in which the encoder does not train.
    """

    warmup_steps: int
    total_steps: int
    frozen_steps: int = 0


def make_schedule(config: Config, *, steps_an_epoch: int) -> Schedule:
    """The settings' epochs in optimizer steps."""
    optim = config.optim
    return Schedule(
        warmup_steps=round(optim.warmup_epochs * steps_an_epoch),
        total_steps=config.run.epochs * steps_an_epoch,
        frozen_steps=round(optim.encoder_frozen_epochs * steps_an_epoch),
    )


class GroupSchedule(LRScheduler):
    """Sets each group's learning rate and weight decay from the number of optimizer steps taken.

    Rates rise linearly to their peak. Then they fall by a half cosine over the run to `min_lr_ratio` of it.
    The encoder's are 0 for `frozen_steps`, and then rise to the same cosine in as many steps as the aggregator's did,
    so that from there on they have their share of it again.

    Weight decay goes from `weight_decay` to `weight_decay_end` by a half cosine over the whole run, without warm-up
    (DINO: Caron et al. 2021, arXiv:2104.14294, sec. 3.2), in the groups that decay.

    While the encoder is frozen its gradients are zero, and its moments stay so. Their count of steps is put back to 0
    after each step: Adam corrects young moments by it, and moments that are as young as the first thawed gradient
    would be taken for old ones, for steps three times too long ((1 − β₁) / √(1 − β₂)). Weight decay is 0 meanwhile,
    for sgd, which would gather it as momentum. So the encoder's optimizer begins when the encoder does.

    Args:
        optimizer: over groups with a `name`, as `optim.parameter_groups` makes them, at their peak rate and first
            decay.
    """

    def __init__(self, optimizer: Optimizer, config: OptimConfig, schedule: Schedule) -> None:
        self._config = config
        self._schedule = schedule
        self._decays = [group["weight_decay"] for group in optimizer.param_groups]
        if schedule.frozen_steps:
            optimizer.register_step_post_hook(_forget_count)
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rate of each group at `last_epoch` steps."""
        return [
            peak * self._rate(group["name"])
            for peak, group in zip(self.base_lrs, self.optimizer.param_groups, strict=True)
        ]

    def step(self, epoch: int | None = None) -> None:
        """Advance by one optimizer step."""
        super().step(epoch)
        self._set_decay()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps; all else follows from the settings."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to where `state_dict` was, the optimizer's groups included."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        self._set_decay()

    def _rate(self, name: str) -> float:
        """Learning rate of a group, as a share of its peak."""
        schedule, step = self._schedule, self.last_epoch
        begin = schedule.frozen_steps if name.startswith("encoder") else 0
        if step < begin:
            return 0.0
        ramp = min(1.0, (step - begin + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
        lowest = self._config.min_lr_ratio
        fall = _cosine(step - schedule.warmup_steps, schedule.total_steps - schedule.warmup_steps)
        return ramp * (lowest + (1 - lowest) * fall)

    def _set_decay(self) -> None:
        end = self._config.weight_decay_end
        for first, group in zip(self._decays, self.optimizer.param_groups, strict=True):
            decay = first
            if end is not None and group["name"].endswith(".decay"):
                decay = end + (first - end) * _cosine(self.last_epoch, self._schedule.total_steps)
            group["weight_decay"] = 0.0 if is_frozen(group) else decay


def _cosine(step: int, steps: int) -> float:
    """A half cosine from 1 at step 0 (and before) down to 0 at `steps` (and after)."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step) / max(1, steps))))


def _forget_count(optimizer: Optimizer, *_: Any) -> None:
    """Let moments of groups that are frozen be new, whatever was done to them (see `GroupSchedule`)."""
    for group in optimizer.param_groups:
        if is_frozen(group):
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if isinstance(count := state.get("step"), torch.Tensor):
                    count.zero_()
                elif count is not None:
                    state["step"] = 0
