"""The frozen baseline: every tile's features once, by an encoder that is not trained; then the aggregator alone.

What trains, on what, and how it is judged is the same as end to end: splits, bags, metrics and checkpoints.
"""

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slidescale.engine.data.cohort import Cohort, Fault, fault_of
from slidescale.engine.data.features import FeatureStore
from slidescale.engine.data.manifest import ManifestRow
from slidescale.engine.data.prefetch import CHUNKS_AHEAD, TileReader, TileRequest
from slidescale.engine.data.tiling import Tiling
from slidescale.engine.errors import SlideError, UserError
from slidescale.engine.logger import Meter
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.parallel.rank_group import RankGroup

log = logging.getLogger(__name__)

# How long a rank that has encoded its share waits for the slowest one: no limit. Shares of days may end hours apart.
UNLIMITED = timedelta(days=365)


def fingerprint(encoder: nn.Module) -> str:
    """Digest of all values in an encoder: its weights, statistics, and the constants that prepare its tiles."""
    digest = hashlib.blake2b(digest_size=16)
    buffers = {name: tensor for name, tensor in encoder.named_buffers() if "stain" not in name}
    for name, tensor in sorted({**encoder.state_dict(), **buffers}.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def encode_cohort(
    model: SlideModel,
    cohort: Cohort,
    store: FeatureStore,
    reader: TileReader,
    mesh: Mesh,
    *,
    chunk: int,
    device: torch.device,
) -> None:
    """Put the features of every usable slide's tissue tiles into the store, except those that are there already.

    Each rank encodes whole slides, its share of `deal`, and meets the others once, when it has finished. A slide that
    cannot be read is set aside, on every rank; one that cannot be read just now, until the run is resumed.

    Args:
        chunk: tiles that go through the encoder at once.

    Raises:
        UserError: features cannot be written, or are not where every rank sees them; too many slides are unusable.
    """
    rows = {row.slide_id: row for row in cohort.manifest.rows if row.slide_id not in cohort.excluded}
    # The main rank looks for all: a file that appears meanwhile, another run's, would divide the ranks.
    missing = mesh.world.ask_main(lambda: _missing(rows, cohort, store))
    tiles = {slide_id: len(cohort.tilings[slide_id].coords) for slide_id in missing}
    log.info(
        "frozen encoder: %s has features of %d slides; %d slides (%s tiles) are to be encoded, %d tiles at a time",
        store.folder,
        len(rows) - len(missing),
        len(missing),
        f"{sum(tiles.values()):,}",
        chunk,
    )
    begin = time.perf_counter()
    mine = deal(tiles, mesh.world.size)[mesh.world.rank]
    meter = Meter("encoding", sum(tiles.values()), "tile", main=mesh.world.rank == 0)
    done = 0  # tiles of this rank; the other ranks are about as far
    faults: dict[str, Fault] = {}
    trouble = None
    model.eval()
    with _without_time_limit(mesh.world) as world:
        for slide_id in mine:
            row, tiling = rows[slide_id], cohort.tilings[slide_id]
            try:
                parts = []
                for part in encode_slide(model, row, tiling, reader, chunk=chunk, device=device):
                    parts.append(part)
                    meter.reach(min((done + sum(map(len, parts))) * world.size, sum(tiles.values())))
                store.save(row.path, tiling, torch.cat(parts), row.mpp_um)
            except SlideError as error:
                faults[slide_id] = fault_of(slide_id, error)
            except OSError as error:  # a full disk, say, on which no other slide has room either
                trouble = f"cannot write features to {store.folder}: {error}"
                if world.size > 1:
                    log.error("rank %d %s; the run ends when the other ranks are done", world.rank, trouble)
                break
            done += tiles[slide_id]
        everyones = world.gather_objects((faults, trouble))
    meter.close()
    for _, each in everyones:
        if each is not None:
            raise UserError(each)
    found = {slide_id: fault for theirs, _ in everyones for slide_id, fault in theirs.items()}
    cohort.exclude(*(found[slide_id] for slide_id in missing if slide_id in found))  # in the manifest's order
    cohort.hold()
    cohort.check_splits()
    if missing:
        seconds = time.perf_counter() - begin
        log.info("features ready (%.0f s, %.0f tiles/s)", seconds, sum(tiles.values()) / seconds)
    unseen = [row.path for row in rows.values() if row.slide_id not in cohort.excluded and not _is_there(row, store)]
    if any(mesh.world.gather_objects(unseen)):
        raise UserError(
            f"not every rank sees the features in {store.folder}: --run.out must be on a file system that all share"
        )


def deal(tiles: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Deal slides out to ranks: each, from the largest on, to the rank that has the fewest tiles so far.

    Args:
        tiles: number of tiles by slide_id; ranks that have the same numbers deal alike.

    Returns:
        The slide_ids of each rank, its largest slide first. No rank has more than 4/3 of what the largest share would
        have if slides were dealt out as evenly as they can be (Graham 1969, SIAM J. Appl. Math. 17:416).
    """
    shares: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for slide_id in sorted(tiles, key=lambda slide_id: (-tiles[slide_id], slide_id)):
        rank = loads.index(min(loads))
        shares[rank].append(slide_id)
        loads[rank] += tiles[slide_id]
    return shares


@contextmanager
def _without_time_limit(world: RankGroup) -> Iterator[RankGroup]:
    """The same ranks, whose collectives wait for each other as long as it takes; every rank enters at the same place.

    A rank that dies meanwhile is noticed all the same, by its closed connection.
    """
    if world.size == 1:
        yield world
        return
    group = dist.new_group(backend="gloo", timeout=UNLIMITED)
    assert isinstance(group, dist.ProcessGroup), "every rank is in it"
    yield RankGroup(world.rank, world.size, group)
    dist.destroy_process_group(group)


def encode_slide(
    model: SlideModel, row: ManifestRow, tiling: Tiling, reader: TileReader, *, chunk: int, device: torch.device
) -> Iterator[Tensor]:
    """Features fp32 `[n, D]`, on the CPU, of all tiles of a slide, chunk by chunk; the next ones are read meanwhile.

    Raises:
        SlideError: the slide cannot be read.
    """
    coords = tiling.coords
    requests = (TileRequest(row.path, coords[at : at + chunk], row.mpp_um) for at in range(0, len(coords), chunk))
    for reading in reader.ahead(requests, CHUNKS_AHEAD):
        tiles = reading.wait().to(device, non_blocking=True)
        with torch.no_grad():
            yield model.encode(tiles).float().cpu()


def _missing(rows: dict[str, ManifestRow], cohort: Cohort, store: FeatureStore) -> list[str]:
    """The slides without features; one whose file is gone counts, and fails when it is to be read.

    Raises:
        UserError: damaged features cannot be deleted.
    """
    missing = []
    for slide_id, row in rows.items():
        try:
            if store.has(row.path, cohort.tilings[slide_id], row.mpp_um):
                continue
        except SlideError:
            pass
        except OSError as error:
            raise UserError(f"cannot write features to {store.folder}: {error}") from None
        missing.append(slide_id)
    return missing


def _is_there(row: ManifestRow, store: FeatureStore) -> bool:
    try:
        return store.file(row.path, row.mpp_um).exists()
    except SlideError:  # it was, when its tiles were read; now its reader will say why it is not
        return True
    except OSError:
        return False
