"""A slide's resolution: what its file states, how far that can be believed, and what takes its place."""

import math
from collections.abc import Mapping

from slidescale.engine.errors import SlideError

# µm per pixel that a microscope's picture may have at all. 72, 96 and 300 dots per inch, which image programs write
# into any file, are 353, 265 and 85 µm per pixel.
POSSIBLE_UM = (0.02, 20.0)
# µm per pixel that slides are scanned at: 0.11 is about 80x, 4 is 2.5x.
USUAL_UM = (0.1, 4.0)
# A scanner's µm per pixel times the power of its objective is about this (0.5 at 20x, 0.25 at 40x), within the factor.
UM_TIMES_POWER, POWER_FACTOR = 10.0, 1.6
# Tiles are square: both axes must agree to this share.
AXES_TOLERANCE = 0.02
TAGS = ("openslide.mpp-x", "openslide.mpp-y")
REMEDY = "state the slide's own, in µm per pixel, in the manifest's column mpp_um (--data.mpp-column)"


def resolution(
    properties: Mapping[str, str], default_mpp_um: float | None, mpp_um: float | None
) -> tuple[float, list[str]]:
    """Level-0 µm per pixel of a slide, and what is doubtful about it.

    Args:
        properties: what the file states, under OpenSlide's names.
        default_mpp_um: taken for a file that states none, or an impossible one.
        mpp_um: given by a person for this slide; it comes before all others.

    Raises:
        SlideError: the file states none that is possible, and no other is given.
    """
    if mpp_um is not None:
        return mpp_um, []
    stated = {tag: properties[tag] for tag in TAGS if tag in properties}
    if not stated:
        if default_mpp_um is None:
            raise SlideError(
                "states no resolution (openslide.mpp-x); give it with --data.default-mpp-um (of a recipe) or "
                f"--default-mpp-um (of slidescale predict), or {REMEDY}"
            )
        return default_mpp_um, []
    found = _possible(list(stated.values()))
    shown = ", ".join(f"{tag} {value}" for tag, value in stated.items())
    if found is None:
        if default_mpp_um is None:
            raise SlideError(f"states an impossible resolution ({shown}); {REMEDY}, or set --data.default-mpp-um")
        return default_mpp_um, [f"states an impossible resolution ({shown}): {default_mpp_um:g} µm/px is taken instead"]
    return found, [f"{doubt}; if it is wrong, {REMEDY}" for doubt in _doubts(found, shown, properties)]


def _possible(values: list[str]) -> float | None:
    """The mean of both axes; None where one of them cannot be, or they differ."""
    try:
        known = [float(value) for value in values]
    except ValueError:
        return None
    low, high = POSSIBLE_UM
    if not all(low <= value <= high for value in known) or max(known) > min(known) * (1 + AXES_TOLERANCE):
        return None
    return sum(known) / len(known)


def _doubts(mpp_um: float, shown: str, properties: Mapping[str, str]) -> list[str]:
    """Reasons to doubt a resolution that is possible."""
    low, high = USUAL_UM
    if not low <= mpp_um <= high:
        return [f"states an unusual resolution ({shown}), where slides have {low:g} to {high:g} µm/px"]
    try:
        power = float(properties.get("openslide.objective-power", "nan"))
    except ValueError:
        return []
    if not power > 0 or not math.isfinite(power):
        return []
    usual = UM_TIMES_POWER / power
    if max(mpp_um / usual, usual / mpp_um) > POWER_FACTOR:
        return [
            f"states {shown}, but an objective of {power:g}x (openslide.objective-power), with which about "
            f"{usual:.2g} µm/px is usual"
        ]
    return []
