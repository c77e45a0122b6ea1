"""What each rank computes on when: an epoch's slides as steps, a step's as slots, a slot's tiles as shares.

A step takes S × A slides: S side by side, one for each tile group, A times after another. In a slot, every rank works
on its share of its tile group's slide, and makes as many encoder calls as every other rank, because these gather
parameters under ZeRO-3 and FSDP2 and must find their partners.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import tee

import numpy as np
from torch import Tensor

from slidescale.engine.config import Config
from slidescale.engine.data.bag import Bag, bag_size, draw_bag, epoch_order
from slidescale.engine.data.cohort import Cohort, fault_of
from slidescale.engine.data.manifest import ManifestRow
from slidescale.engine.data.prefetch import Reading, TileReader, TileRequest
from slidescale.engine.errors import SlideError
from slidescale.engine.memory.planner import Plan
from slidescale.engine.parallel.mesh import Mesh


@dataclass(frozen=True)
class Share:
    """A rank's part in one slot of a step.

    Attributes:
        bag: of the tile group's slide.
        tiles: this rank's share of the bag, uint8 `[K_local, H, W, 3]`; of a frozen encoder, features `[K_local, D]`.
        count: chunks that every rank of the world encodes in this slot.
        stored: of these, the number whose graphs are stored.
        weight: factor on the slide's loss; 0 for a stand-in, which keeps a tile group without a slide in step.
    """

    bag: Bag
    tiles: Tensor
    count: int
    stored: int
    weight: float = 1.0


@dataclass
class Step:
    """The slides of one optimizer step.

    Attributes:
        rows: its slides, S × A of them or, at the end of an epoch, fewer.
        k: tiles in all their bags.
        slots: that every rank works on, and
        chunks: that it encodes in all of them.
        shares: this rank's, a slot each; only one at a time is in memory, beside those that are read ahead.
        waited_s: time spent waiting for tiles, so far.
    """

    rows: Sequence[ManifestRow]
    k: int
    slots: int
    chunks: int
    shares: Iterator[Share] = field(default_factory=lambda: iter(()))
    waited_s: float = 0.0


class Feed:
    """Draws, reads and hands out the bags of training."""

    def __init__(self, config: Config, cohort: Cohort, reader: TileReader, mesh: Mesh, plan: Plan) -> None:
        self._config = config
        self._cohort = cohort
        self._reader = reader
        self._mesh = mesh
        self._plan = plan

    def epoch(self, epoch: int) -> Iterator[Step]:
        """The steps of an epoch; a step without any slide that can be read is left out."""
        slides, data = self._mesh.slides, self._config.data
        seed, usable = self._config.run.seed, self._cohort.usable("train")
        rows = epoch_order(usable, seed=seed, epoch=epoch, share=data.epoch_share)
        own, to_read = tee(self._draw(row, epoch) for row in rows[self._mesh.slide :: slides])
        requests = (
            TileRequest(bag.row.path, bag.coords[self._mesh.tiles.share(bag.k)], bag.row.mpp_um) for bag in to_read
        )
        readings = self._reader.ahead(requests, data.prefetch)
        size = slides * self._config.optim.accumulate
        for begin in range(0, len(rows), size):
            step_rows = rows[begin : begin + size]
            slots = [step_rows[at : at + slides] for at in range(0, len(step_rows), slides)]
            sizes = [[bag_size(self._cohort.tilings[row.slide_id], data.k) for row in slot] for slot in slots]
            counts = [max(self._mesh.tiles.chunk_count(k, self._plan.chunk) for k in ks) for ks in sizes]
            step = Step(step_rows, sum(map(sum, sizes)), len(counts), sum(counts))
            shares = (
                self._share(step, slot, count, self._plan.stored_chunks(max(ks)), own, readings)
                for slot, count, ks in zip(slots, counts, sizes, strict=True)
            )
            for slot, count in zip(slots, counts, strict=True):
                first = next(shares)
                if any(row.slide_id not in self._cohort.excluded for row in slot):
                    step.shares = _chain(first, shares)
                    del first  # it would be held for the whole step
                    yield step
                    break
                step.slots -= 1  # nothing to compute: the step begins with the next slot
                step.chunks -= count

    def _share(
        self,
        step: Step,
        slot: Sequence[ManifestRow],
        count: int,
        stored: int,
        bags: Iterator[Bag],
        readings: Iterator[Reading],
    ) -> Share:
        """This rank's share of a slot, once every rank knows which of its slides could be read.

        A step's loss is the mean over its slides; one that turns out to be unreadable counts as zero.
        """
        bag, tiles, fault = None, None, None
        if self._mesh.slide < len(slot):
            begin = time.perf_counter()
            bag = next(bags)
            try:
                tiles = next(readings).wait()
            except SlideError as error:
                fault = fault_of(bag.row.slide_id, error)
            step.waited_s += time.perf_counter() - begin
        self._cohort.exclude_faults(fault)
        if bag is None or tiles is None or bag.row.slide_id in self._cohort.excluded:
            return self._stand_in(slot[0], count, stored)
        return Share(bag, tiles, count, stored, weight=self._mesh.slides / len(step.rows))

    def _stand_in(self, row: ManifestRow, count: int, stored: int) -> Share:
        """One blank tile whose loss does not count."""
        bag = Bag(row, np.zeros((1, 2), np.int64), 1.0, seed=0)
        mine = self._mesh.tiles.share(bag.k)
        return Share(bag, self._reader.blank(mine.stop - mine.start), count, stored, weight=0.0)

    def _draw(self, row: ManifestRow, epoch: int) -> Bag:
        tiling = self._cohort.tilings[row.slide_id]
        return draw_bag(row, tiling, self._config.data.k, seed=self._config.run.seed, epoch=epoch)


def _chain(first: Share, others: Iterator[Share]) -> Iterator[Share]:
    """`first`, then the others, without holding on to what has been handed out."""
    yield first
    del first
    yield from others
