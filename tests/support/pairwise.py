"""Few combinations of settings in which every two values of two settings meet."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

# A setting's name and the place of its value in the list of values.
_Choice = tuple[str, int]


def pairwise(
    settings: Mapping[str, Sequence[Any]], is_possible: Callable[[dict[str, Any]], bool] = lambda _: True
) -> list[dict[str, Any]]:
    """Combinations, each with a value for every setting, the same on every call.

    Args:
        settings: names and values.
        is_possible: False for values that cannot go together. It is also asked about a part of the settings, and must
            be True as long as the rest can still be chosen.
    """
    names = list(settings)
    left = {
        frozenset({(a, i), (b, j)}): None
        for a, b in combinations(names, 2)
        for i, j in product(range(len(settings[a])), range(len(settings[b])))
    }
    used: Counter[_Choice] = Counter()

    def complete(chosen: dict[str, int]) -> dict[str, int] | None:
        """Choose the rest: first what brings together the most that has not met, then what was used least."""
        name = next((each for each in names if each not in chosen), None)
        if name is None:
            return chosen

        def rank(value: int) -> tuple[int, int]:
            new = sum(frozenset({(name, value), other}) in left for other in chosen.items())
            return -new, used[name, value]

        for value in sorted(range(len(settings[name])), key=rank):
            more = chosen | {name: value}
            if is_possible(values(more)) and (whole := complete(more)) is not None:
                return whole
        return None

    def values(chosen: dict[str, int]) -> dict[str, Any]:
        return {name: settings[name][place] for name, place in chosen.items()}

    found = []
    while left:
        pair = next(iter(left))
        first = dict(sorted(pair, key=lambda choice: names.index(choice[0])))
        whole = complete(first) if is_possible(values(first)) else None
        if whole is None:  # these two never meet
            del left[pair]
            continue
        used.update(whole.items())
        for met in combinations(whole.items(), 2):
            left.pop(frozenset(met), None)
        found.append({name: settings[name][whole[name]] for name in names})
    return found
