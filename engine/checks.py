"""What a setting's value must be: rules, and the error that names the setting that breaks one."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from slidescale.engine.errors import ConfigError, flag

# What holds for a value, and the same in words.
Rule = tuple[Callable[[Any], bool], str]


def at_least(least: int, unit: str = "") -> Rule:
    """A number from `least` on."""
    return (lambda value: value >= least), f"must be at least {least} {unit}".rstrip()


def either(word: str | None, rule: Rule) -> Rule:
    """A word such as "auto", or what the rule allows; None, which nobody types, is not in the error."""
    words = rule[1] if word is None else rule[1].replace("must be", f"must be {word}, or", 1)
    return (lambda value: value == word or rule[0](value)), words


POSITIVE: Rule = (lambda value: 0 < value < math.inf), "must be positive"
NOT_NEGATIVE: Rule = (lambda value: 0 <= value < math.inf), "must not be negative"
SHARE: Rule = (lambda value: 0 <= value <= 1), "must be a share from 0 to 1"
SHARE_ABOVE_0: Rule = (lambda value: 0 < value <= 1), "must be a share above 0, at most 1"
SHARE_BELOW_1: Rule = (lambda value: 0 <= value < 1), "must be a share from 0, below 1"
PROBABILITY: Rule = SHARE_BELOW_1[0], "must be a probability from 0, below 1"
DISTINCT: Rule = (lambda value: len(set(value)) == len(value)), "must be distinct"
RESOLUTION: Rule = POSITIVE[0], "must be a positive number of µm per pixel"


def require(holds: bool, name: str, value: Any, rule: str) -> None:
    """Refuse a value.

    Args:
        name: the setting, dotted.

    Raises:
        ConfigError: it does not hold.
    """
    if not holds:
        raise ConfigError(f"{flag(name)} is {value!r}: {rule}")


def check(settings: object, rules: Mapping[str, Rule], section: str = "") -> None:
    """Refuse the first value that breaks its rule.

    Args:
        rules: by the names of the settings that have one in common, separated by spaces.
        section: of the command line, such as "data"; empty where settings have no prefix.

    Raises:
        ConfigError: names the setting.
    """
    for names, (holds, rule) in rules.items():
        for name in names.split():
            value = getattr(settings, name)
            require(holds(value), f"{section}.{name}" if section else name, value, rule)


def refuse_unread(config: Any, rules: Mapping[str, str]) -> None:
    """Refuse settings that have no effect beside another one, all of them at once: a recipe may have set several.

    Args:
        config: sections, each of which has settings with defaults.
        rules: why settings have no effect, by their dotted names, separated by spaces.

    Raises:
        ConfigError: names each that is not at its default, and what to type for a run without them.
    """
    lines, words = [], []
    for name, rule in ((name, rule) for names, rule in rules.items() for name in names.split()):
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        default = getattr(type(getattr(config, section)), key)
        if value != default:
            lines.append(f"{flag(name)} is {value!r}: {rule}")
            words.append(flag(name).replace(".", ".no-") if default is False else f"{flag(name)} {default}")
    if lines:
        raise ConfigError("\n".join(lines) + f"\nto leave them at their defaults, add: {' '.join(words)}")
