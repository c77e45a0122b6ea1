"""The order of training: the slides of an epoch as steps, those of a step as slots, the tiles of a slot as shares.

A step takes S × A slides: S side by side, one for each tile group, A times after another. In a slot, every rank works
on its share of its tile group's slide, and makes as many encoder calls as every other rank, because these gather
parameters under ZeRO-3 and FSDP2 and must find their partners.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import tee

import torch
from torch import Tensor

from slidescale.engine.config import Config
from slidescale.engine.data.bag import Bag, bag_size, draw_bag, epoch_order
from slidescale.engine.data.cohort import Cohort, fault_of
from slidescale.engine.data.manifest import ManifestRow
from slidescale.engine.data.prefetch import Reading, TileReader, TileRequest
from slidescale.engine.errors import SlideError
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.training.step import Share, Step


class Feed:
    """Draws, reads and hands out the bags of training."""

    def __init__(self, config: Config, cohort: Cohort, reader: TileReader, mesh: Mesh) -> None:
        self._config = config
        self._cohort = cohort
        self._reader = reader
        self._mesh = mesh

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
            names = tuple(row.slide_id for row in step_rows)
            step = Step(names, sum(map(sum, sizes)), [max(ks) for ks in sizes])
            shares = (self._share(step, slot, own, readings) for slot in slots)
            for slot in slots:
                first = next(shares)
                if any(row.slide_id not in self._cohort.excluded for row in slot):
                    step.shares = _chain(first, shares)
                    del first  # it would be held for the whole step
                    yield step
                    break
                step.slots = step.slots[1:]  # nothing to compute: the step begins with the next slot

    def _share(
        self, step: Step, slot: Sequence[ManifestRow], bags: Iterator[Bag], readings: Iterator[Reading]
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
            return self._stand_in(slot[0])
        weight = self._mesh.slides / len(step.names)
        return Share(bag.row.slide_id, tiles, _target(bag.row), bag.places, bag.seed, weight)

    def _stand_in(self, row: ManifestRow) -> Share:
        """One blank tile whose loss does not count."""
        mine = self._mesh.tiles.share(1)
        tiles = self._reader.blank(mine.stop - mine.start)
        return Share(row.slide_id, tiles, _target(row), torch.zeros(1, 2), seed=0, weight=0.0)

    def _draw(self, row: ManifestRow, epoch: int) -> Bag:
        tiling = self._cohort.tilings[row.slide_id]
        return draw_bag(row, tiling, self._config.data.k, seed=self._config.run.seed, epoch=epoch)


def _chain(first: Share, others: Iterator[Share]) -> Iterator[Share]:
    """`first`, then the others, without holding on to what has been handed out."""
    yield first
    del first
    yield from others


def _target(row: ManifestRow) -> Tensor:
    """The target of a slide, as the objective takes it."""
    return torch.tensor(row.target, dtype=torch.float64)
