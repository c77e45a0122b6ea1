"""All kinds of supervision by name. A new kind is a file beside this one, and a line here."""

from collections.abc import Sequence
from typing import Any

from slidescale.engine.config import Config, DataConfig, OptimConfig
from slidescale.engine.errors import ConfigError, flag
from slidescale.engine.supervision.base import Supervision, Target
from slidescale.engine.supervision.classes import Classes
from slidescale.engine.supervision.multi_label import MultiLabel
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.supervision.ordinal import Ordinal
from slidescale.engine.supervision.regression import Regression
from slidescale.engine.supervision.survival import Survival

KINDS: dict[str, Supervision] = {
    kind.name: kind
    for kind in (
        Classes(),
        Ordinal(),
        MultiLabel(),
        Regression(),
        Survival(),
    )
}


def supervision_of(name: str) -> Supervision:
    """The kind of that name."""
    return KINDS[name]


def fit_objective(names: Sequence[str], targets: Sequence[Target], config: Config) -> Objective:
    """The objective for a manifest.

    Args:
        names: of what is predicted, as `Manifest.classes`.
        targets: of the train split's slides.

    Raises:
        ConfigError: settings do not fit the names.
        ValueError: the targets have no scale, or cannot be cut into bins.
    """
    return supervision_of(config.data.supervision).fit(names, targets, config)


def make_objective(record: dict[str, Any]) -> Objective:
    """The objective that `Objective.record` describes, for a model that is already trained."""
    settings = {name: value for name, value in record.items() if name != "supervision"}
    return supervision_of(record["supervision"]).objective(**settings)


def headline_title(metric: str) -> str:
    """How people write the name of a kind's headline metric."""
    return next((kind.headline_title for kind in KINDS.values() if kind.headline == metric), metric)


def check_settings(data: DataConfig, optim: OptimConfig | None = None) -> None:
    """Refuse settings that another kind of supervision reads, and names of columns that are missing.

    Raises:
        ConfigError: names the setting, and the kinds that read it.
    """
    own = supervision_of(data.supervision)
    readers: dict[str, list[str]] = {}
    for kind in KINDS.values():
        for setting in (*(f"data.{name}" for name in kind.column_settings), *kind.settings):
            readers.setdefault(setting, []).append(kind.name)
    groups = {"data": data, "optim": optim or OptimConfig()}
    for setting, kinds in readers.items():
        group, _, name = setting.partition(".")
        value = getattr(groups[group], name)
        if own.name not in kinds and value != getattr(type(groups[group])(), name):
            *others, last = kinds
            readable = f"{', '.join(others)} and {last}" if others else last
            raise ConfigError(
                f"{flag(setting)} is {value!r}: is for --data.supervision {readable}, and that is {own.name}"
            )
    for name in own.column_settings:
        if not getattr(data, name):
            raise ConfigError(f"{flag(f'data.{name}')} is {getattr(data, name)!r}: must name a column")
