"""Bags of tensors, as a loop of one's own hands them to a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slidescale.engine.errors import UserError
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.seeding import derive_seed
from slidescale.engine.training.step import Share, Step


@dataclass(frozen=True, eq=False)
class Bag:
    """This rank's tiles of one slide.

    Attributes:
        tiles: `[K_local, …]` as the encoder takes them, on any device: the rows `mesh.tiles.share(K)` of the bag's K
            tiles, which are all of them where one rank has the slide to itself.
        target: as the loss takes it: a tensor, or a number, of which `torch.as_tensor` makes one.
        name: of the slide, for messages.
        places: `[K, 2]`, where each of the bag's K tiles lies on the slide, counted in tiles, for aggregators that look
            at it, as transformer layers do. None: all at one place.
        seed: of everything random that happens to the bag, the same on every rank; None: derived from the number of the
            step.
    """

    tiles: Tensor
    target: Any = 0
    name: str = ""
    places: Tensor | None = None
    seed: int | None = None


@dataclass(frozen=True)
class _Known:
    """What every rank knows of one rank's bag."""

    name: str
    tiles: int
    places: int | None


def to_step(bags: Sequence[Bag], mesh: Mesh, number: int) -> Step:
    """One optimizer step on the bags of all tile groups: the mean of their gradients.

    Args:
        bags: this rank's, one after another; each tile group has as many.
        number: of the step, from which seeds are derived.

    Raises:
        UserError: ranks have different numbers of bags, or one does not have its share of a bag's tiles; on every rank
            alike.
    """
    ranks = mesh.world.gather_objects(
        [_Known(bag.name, len(bag.tiles), None if bag.places is None else len(bag.places)) for bag in bags]
    )
    if len({len(each) for each in ranks}) > 1 or not bags:
        numbers = ", ".join(f"rank {rank} has {len(each)}" for rank, each in enumerate(ranks))
        raise UserError(f"a step takes at least one bag, and as many on every rank: {numbers}")
    per_row = mesh.tiles.size
    rows = [ranks[first : first + per_row] for first in range(0, len(ranks), per_row)]
    slots = range(len(bags))
    # Tiles of the bag that a tile group has in a slot.
    sizes = [[sum(known[slot].tiles for known in row) for row in rows] for slot in slots]
    names: list[str] = []
    for slot in slots:
        for group, row in enumerate(rows):
            name = row[0][slot].name or f"bag {slot} of tile group {group}"
            names.append(name if name not in names else f"{name} (bag {slot} of tile group {group})")
            for rank, known in enumerate(row):
                _check(known[slot], names[-1], TileGroup(rank, per_row), sizes[slot][group])
    own = names[mesh.slide :: mesh.slides]
    shares = (
        Share(
            own[slot],
            bag.tiles,
            torch.as_tensor(bag.target),
            torch.zeros(sizes[slot][mesh.slide], 2) if bag.places is None else bag.places.to(torch.float32),
            derive_seed("bag", number, slot, mesh.slide) if bag.seed is None else bag.seed,
            weight=1 / len(bags),
        )
        for slot, bag in enumerate(bags)
    )
    return Step(tuple(names), sum(map(sum, sizes)), [max(ks) for ks in sizes], shares)


def _check(known: _Known, name: str, group: TileGroup, k: int) -> None:
    """Refuse a bag of which a rank has not its share, or not the places of all tiles."""
    if k == 0:
        raise UserError(f"{name} has no tiles")
    own = group.share(k)
    if known.tiles != own.stop - own.start:
        raise UserError(
            f"{name}: rank {group.rank} of {group.size} has {known.tiles} of its {k} tiles, and must have "
            f"{own.stop - own.start}: give each rank the rows mesh.tiles.share(K)"
        )
    if known.places not in (None, k):
        raise UserError(
            f"{name}: rank {group.rank} of {group.size} has the places of {known.places} tiles, and the bag has {k}: "
            "give each rank those of all tiles"
        )
