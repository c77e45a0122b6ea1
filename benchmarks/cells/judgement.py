"""A check of training before any speed is reported: a cell must change the model as plain autograd does."""

import math
import shutil
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

from slidescale.engine.memory.planner import CHUNK_CAP

from cells.cell import measure
from cells.harness import Ended, Limits
from cells.ways import POLICIES, Cell

# In fp32 the engine adds the same numbers in another order: about 1e-7 per step, and more where a network amplifies it.
BOUND = 1e-4
# bf16 rounds at other places in each way to train. The measure is the error that this makes in plain autograd.
TIMES_PLAIN = 2.0
# Never so large that a chunk could be missing.
MOST = 0.1
# Least number of chunks per rank, where their size is left to the engine.
CHUNKS = 3
# Columns that a cell that fails does not report: a correct one may be slower.
SPEEDS = ("step_s", "steps_s", "tiles_per_s", "slides_per_h", "shares", "features_s", "communication")


class Judge:
    """Compares cells with plain autograd in fp32, on one rank, over as many steps.

    A reference is made once for all cells that it serves, and deleted with the judge.

    Args:
        slide: the file to read tiles from.
        limits: what a reference may take.
        folder: for logs, and for references while the judge lives.
    """

    def __init__(self, *, slide: Path, limits: Limits, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._slide = slide
        self._limits = limits
        self._folder = folder
        self._references = Path(tempfile.mkdtemp(prefix="references-", dir=folder))
        weakref.finalize(self, shutil.rmtree, self._references, ignore_errors=True)
        self._made: dict[Cell, tuple[Ended, Path]] = {}
        self._bounds: dict[Cell, tuple[Ended, float]] = {}

    def judge(self, cell: Cell, *, limits: Limits, log: Path) -> tuple[Ended, dict[str, Any]]:
        """Run a cell, and compare.

        Args:
            limits: what the cell may take.
            log: the file for the output of its processes.

        Returns:
            How it ended, with "wrong gradient" as a further status; and its row, with `gradient_error` (see
            `cell.change_error`) and the `gradient_bound` that it must not exceed. Where it does, speeds are left out.
        """
        cell = in_chunks(cell)
        ended, reference, bound = self._bound(cell)
        if ended.status != "ok":
            message = f"no reference: plain autograd at K = {cell.k:,}: {ended.message}; take a smaller K"
            return Ended("failed", message), {}
        ended, row = measure(cell, slide=self._slide, limits=limits, reference=reference, log=log)
        if ended.status != "ok":
            return ended, {}
        error = row.pop("change_error")
        row |= {"gradient_error": error, "gradient_bound": bound}
        if not error <= bound:  # a NaN is not, either
            message = (
                f"the model's change differs from that of plain autograd by {error:.2e} of it; {bound:.2e} is allowed"
            )
            return Ended("wrong gradient", message), {key: row[key] for key in row if key not in SPEEDS}
        return ended, row

    def _bound(self, cell: Cell) -> tuple[Ended, Path, float]:
        """Return how making them ended, the reference of a cell, and the largest error that a correct one may have."""
        ended, reference = self._reference(cell)
        if ended.status != "ok" or cell.dtype == "float32":
            return ended, reference, BOUND
        plain = plain_autograd(cell, cell.dtype)
        if plain not in self._bounds:
            ended, row = measure(
                plain, slide=self._slide, limits=self._limits, log=self._log(plain), reference=reference
            )
            self._bounds[plain] = ended, _bound_by(row.get("change_error", math.nan))
        ended, bound = self._bounds[plain]
        return ended, reference, bound

    def _reference(self, cell: Cell) -> tuple[Ended, Path]:
        exact = plain_autograd(cell, "float32")
        if exact not in self._made:
            file = self._references / f"{len(self._made)}.pt"
            ended, _ = measure(
                exact, slide=self._slide, limits=self._limits, log=self._log(exact), reference=file, is_reference=True
            )
            self._made[exact] = ended, file
        return self._made[exact]

    def _log(self, plain: Cell) -> Path:
        return self._folder / f"reference-{plain.parts}-{plain.k}-{plain.steps}-{plain.dtype}.log"


def _bound_by(plain_error: float) -> float:
    """The largest error of a correct cell, from that of plain autograd in the same precision; NaN stays NaN."""
    return plain_error if math.isnan(plain_error) else min(MOST, TIMES_PLAIN * plain_error)


def in_chunks(cell: Cell) -> Cell:
    """Divide the tiles of a cell into several chunks, without which faults between them could not show."""
    if cell.chunk != "auto" or cell.policy not in POLICIES:
        return cell
    return replace(cell, chunk=max(1, min(CHUNK_CAP[cell.device], cell.k // cell.ranks // CHUNKS)))


def plain_autograd(cell: Cell, dtype: str) -> Cell:
    """Return the cell that trains the same parts of the same model on the same tiles by plain autograd, on one rank."""
    return replace(
        cell,
        policy="plain",
        strategy="single",
        ranks=1,
        chunk="auto",
        budget=0,
        kernels="torch",
        dtype=dtype,
        counted=(),
    )
