"""Whether a cell's training is right: its change of the model against plain autograd's, before any speed is told."""

import shutil
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

from cell import measure
from harness import Ended, Limits
from ways import Cell

# In fp32 the engine adds the same numbers in another order: some 1e-7 a step, and more where a network amplifies it.
BOUND = 1e-4
# bf16 rounds at other places in each way to train; PyTorch's own error by that, in plain autograd, is the measure.
TIMES_PLAIN = 2.0
# What is not told of a cell that is wrong, for a right one's may be otherwise.
SPEEDS = ("step_s", "steps_s", "tiles_per_s", "slides_per_h", "shares", "features_s", "communication")


class Judge:
    """Compares cells with plain autograd in fp32, on one rank, over as many steps.

    A reference is made once for all cells that it serves, and deleted with the judge.

    Args:
        slide: that has the tiles.
        limits: what a reference may take, and a cell that is given none of its own.
        folder: where the logs go, and references while the judge lives.
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

    def judge(
        self, cell: Cell, *, limits: Limits | None = None, log: Path | None = None
    ) -> tuple[Ended, dict[str, Any]]:
        """Run a cell, and compare.

        Args:
            limits: of the cell, where they differ from the references'.
            log: where its processes' output goes.

        Returns:
            How it ended, "wrong gradient" being one way; and its row, with `gradient_error` (see `cell.change_error`)
            and the `gradient_bound` that it must not exceed, and without speeds where it does.
        """
        ended, reference, bound = self._bound(cell)
        if ended.status != "ok":
            return Ended("failed", f"no reference, plain autograd: {ended.status}: {ended.message}"), {}
        ended, row = measure(
            cell, slide=self._slide, limits=limits or self._limits, reference=reference,
            log=log or self._folder / f"{cell.policy}-{cell.strategy}-{cell.ranks}-{cell.k}.log",
        )  # fmt: skip
        if ended.status != "ok":
            return ended, {}
        error = row.pop("change_error")
        row |= {"gradient_error": error, "gradient_bound": bound}
        if not error <= bound:  # a NaN is not, either
            message = f"the model's change differs from plain autograd's by {error:.2e} of it, and may by {bound:.2e}"
            return Ended("wrong gradient", message), {key: row[key] for key in row if key not in SPEEDS}
        return ended, row

    def _bound(self, cell: Cell) -> tuple[Ended, Path, float]:
        """How making them ended, the reference of a cell, and the largest right error."""
        ended, reference = self._reference(cell)
        if ended.status != "ok" or cell.dtype == "float32":
            return ended, reference, BOUND
        plain = plain_autograd(cell, cell.dtype)
        if plain not in self._bounds:
            ended, row = measure(
                plain, slide=self._slide, limits=self._limits, log=self._log(plain), reference=reference
            )
            self._bounds[plain] = ended, TIMES_PLAIN * row.get("change_error", float("nan"))
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


def plain_autograd(cell: Cell, dtype: str) -> Cell:
    """The cell that trains the same parts of the same model on the same tiles, on one rank, by plain autograd."""
    return replace(cell, policy="plain", strategy="single", ranks=1, chunk="auto", budget=0, dtype=dtype, counted=())
