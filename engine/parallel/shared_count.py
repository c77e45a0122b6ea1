"""A number that ranks add to without waiting for each other."""

import uuid

from torch.distributed import distributed_c10d

from slidescale.engine.parallel.rank_group import RankGroup


class SharedCount:
    """Counts from 0, over all ranks; every rank makes it, at the same place.

    It is kept where the ranks met, and not by a collective: no rank waits, however far the others are.
    """

    def __init__(self, world: RankGroup) -> None:
        self._alone = 0
        self._key = world.gather_objects(uuid.uuid4().hex)[0]
        self._store = distributed_c10d._get_default_store() if world.size > 1 else None

    def add(self, amount: int) -> int:
        """The count after `amount` has been added to it."""
        if self._store is not None:
            return self._store.add(self._key, amount)
        self._alone += amount
        return self._alone
