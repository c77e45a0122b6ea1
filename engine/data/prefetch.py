"""Background reading: the next tiles are decoded while the present ones are computed on."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slidescale.engine.data.slide import Slide, open_slide
from slidescale.engine.data.tiling import TileSpec, exact_corners
from slidescale.engine.errors import SlideError

# Chunks that are read while one is encoded.
CHUNKS_AHEAD = 4


@dataclass(frozen=True, eq=False)
class TileRequest:
    """Tiles of one slide that this rank wants.

    Attributes:
        coords: int64 `[n, 2]`, level-0 (x, y) of tiles of the slide's grid, as `Tiling.coords`.
        mpp_um: level-0 resolution, µm per pixel, in place of what the file states.
    """

    path: Path
    coords: np.ndarray
    mpp_um: float | None = None


class Reading:
    """A request under way.

    Attributes:
        tiles: uint8 `[n, tile_px, tile_px, 3]`; its content is not defined before `wait` has returned.
    """

    def __init__(self, tiles: Tensor, parts: list[Future[None]]) -> None:
        self.tiles = tiles
        self._parts = parts

    def wait(self) -> Tensor:
        """The tiles, once they are all there.

        Raises:
            SlideError: the slide could not be opened or read.
        """
        for part in self._parts:
            part.result()
        return self.tiles

    def cancel(self) -> None:
        """Give up the parts that have not begun."""
        for part in self._parts:
            part.cancel()


class TileReader:
    """A pool of threads that read tiles (OpenSlide leaves Python's lock while it decodes).

    Each thread keeps its last slide open, for the next request is often of the same slide, and no more than one,
    for an open slide holds tens of MiB.

    Args:
        threads: number of reader threads.
        pin: allocate page-locked memory, from which copying to a GPU does not hold up the CPU.
    """

    def __init__(self, spec: TileSpec, *, threads: int, pin: bool) -> None:
        self.spec = spec
        self._threads = threads
        self._pin = pin
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tile-reader")
        self._mine = threading.local()

    def ahead(self, requests: Iterable[TileRequest], depth: int) -> Iterator[Reading]:
        """Answer requests in order, with up to `depth` more of them under way than the one handed out.

        A slide that could not be read is not tried again for later requests of the same call, which fail at once: its
        tries take seconds, and the slide is of no use without these tiles.
        """
        under_way: deque[Reading] = deque()
        failed: dict[Path, SlideError] = {}
        try:
            for request in requests:
                under_way.append(self._start(request, failed))
                if len(under_way) > depth:
                    yield under_way.popleft()
            while under_way:
                yield under_way.popleft()
        finally:
            for reading in under_way:
                reading.cancel()

    def blank(self, n: int) -> Tensor:
        """Make n tiles without content, of the shape and dtype of those that are read."""
        return self._empty(n).zero_()

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _start(self, request: TileRequest, failed: dict[Path, SlideError]) -> Reading:
        tiles = self._empty(len(request.coords))
        # Contiguous parts, so that a thread meets neighbouring tiles and reuses what OpenSlide has just decoded.
        parts = np.array_split(np.arange(len(tiles)), self._threads)
        return Reading(
            tiles,
            [
                self._pool.submit(
                    self._read_once,
                    replace(request, coords=request.coords[part]),
                    tiles.numpy()[part[0] : part[-1] + 1],
                    failed,
                )
                for part in parts
                if len(part)
            ],
        )

    def _read_once(self, request: TileRequest, out: np.ndarray, failed: dict[Path, SlideError]) -> None:
        if request.path in failed:
            raise failed[request.path]
        try:
            self._read(request, out)
        except SlideError as error:
            failed[request.path] = error
            raise

    def _empty(self, n: int) -> Tensor:
        side = self.spec.tile_px
        return torch.empty((n, side, side, 3), dtype=torch.uint8, pin_memory=self._pin)

    def _read(self, request: TileRequest, out: np.ndarray) -> None:
        size = (self.spec.tile_px, self.spec.tile_px)
        try:
            slide = self._open(request.path, request.mpp_um)
            corners = exact_corners(request.coords, self.spec.side_px(slide))
            for tile, (x, y) in zip(out, corners.tolist(), strict=True):
                tile[:] = slide.read(x, y, size, self.spec.mpp_um)
        except SlideError:
            self._close_mine()  # a slide that raised must be opened anew
            raise

    def _open(self, path: Path, mpp_um: float | None) -> Slide:
        slide: Slide | None = getattr(self._mine, "slide", None)
        if slide is None or self._mine.opened != (path, mpp_um):
            self._close_mine()
            slide = self._mine.slide = open_slide(path, default_mpp_um=self.spec.default_mpp_um, mpp_um=mpp_um)
            self._mine.opened = (path, mpp_um)
        return slide

    def _close_mine(self) -> None:
        slide: Slide | None = getattr(self._mine, "slide", None)
        if slide is not None:
            slide.close()
            self._mine.slide = None
