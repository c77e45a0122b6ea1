"""Files that cannot be read now are told from damaged ones, and tried again."""

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest

from slidescale.engine.data import retry
from slidescale.engine.data.cohort import Cohort, Fault
from slidescale.engine.data.manifest import Manifest, ManifestRow
from slidescale.engine.data.prefetch import TileReader, TileRequest
from slidescale.engine.data.retry import reading
from slidescale.engine.data.slide import open_slide
from slidescale.engine.data.tiling import TileSpec, Tiling, cached_tiling
from slidescale.engine.errors import SlideError, SlideUnavailableError, UserError
from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.parallel.tile_parallel import TileGroup

from support.slides import Away
from support.tables import read_csv
from support.worlds import World

SPEC = TileSpec(tile_px=224, mpp_um=0.5, min_tissue=0.5, default_mpp_um=None)


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN])
def test_an_error_that_passes_is_read_over(
    real_slide: Path, monkeypatch: pytest.MonkeyPatch, calls: int, number: int
) -> None:
    away = Away(monkeypatch, real_slide, calls, number)
    with open_slide(real_slide) as slide:
        assert slide.read(480, 960, (8, 8), 0.5).shape == (8, 8, 3)
    assert away.left == 0


def test_an_error_that_stays_is_not_damage(real_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(retry, "PAUSES_S", (0.5, 2.0))
    monkeypatch.setattr(retry.time, "sleep", waited.append)
    Away(monkeypatch, real_slide, 1000)
    with pytest.raises(SlideUnavailableError, match="cannot open .* now, in 3 tries: Input/output error"):
        open_slide(real_slide)
    assert waited == [0.5, 2.0]


def test_what_is_missing_or_damaged_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "damaged.svs").write_bytes(b"not a slide")
    (tmp_path / "folder.svs").mkdir()
    for name, reason in (("none.svs", "no such file"), ("damaged.svs", "not of a kind"), ("folder.svs", "directory")):
        with pytest.raises(SlideError, match=f"cannot open .*{name}: .*{reason}") as caught:
            open_slide(tmp_path / name)
        assert not isinstance(caught.value, SlideUnavailableError)


def test_a_file_that_is_being_written_is_not_damaged(tmp_path: Path) -> None:
    path = tmp_path / "s.svs"
    path.write_bytes(b"half")

    def attempt() -> None:
        with path.open("ab") as file:
            file.write(b"more")
        raise openslide.OpenSlideError("too short")

    with pytest.raises(SlideUnavailableError, match="is being written"):
        reading(path, "cannot open it", attempt, (openslide.OpenSlideError,))


def test_a_read_that_fails_once_is_repeated(real_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSlide refuses every read after a failed one, so the slide is opened anew."""
    broken: set[int] = set()
    read_region = openslide.OpenSlide.read_region

    def fail_once(file: openslide.OpenSlide, *args: object) -> object:
        if not broken:
            broken.add(id(file))
        if id(file) in broken:
            raise openslide.OpenSlideError("I/O error")
        return read_region(file, *args)

    with open_slide(real_slide) as slide:
        expected = slide.read(480, 960, (64, 64), 0.5)
        monkeypatch.setattr(openslide.OpenSlide, "read_region", fail_once)
        np.testing.assert_array_equal(slide.read(480, 960, (64, 64), 0.5), expected)


def test_a_slide_that_failed_is_tried_once_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.svs"
    path.write_bytes(b"not a slide")
    away = Away(monkeypatch, path, 1000)
    reader = TileReader(SPEC, threads=1, pin=False)
    request = TileRequest(path, np.zeros((1, 2), np.int64))
    seen = []
    for answer in reader.ahead([request] * 20, 2):
        with pytest.raises(SlideUnavailableError):
            answer.wait()
        seen.append(away.left)
    assert len(set(seen)) == 1, "only the first has asked the file system"
    with pytest.raises(SlideUnavailableError):
        next(iter(reader.ahead([request], 0))).wait()
    assert away.left < seen[0]
    reader.close()


# ---- the cohort


def make_cohort(folder: Path, world: RankGroup, files: list[Path], max_excluded: float = 1.0) -> Cohort:
    rows = [ManifestRow(f"s{at}", f"c{at}", path, (0.0,), "train") for at, path in enumerate(files)]
    return Cohort(
        Manifest(tuple(rows), ("a", "b")), world, max_excluded=max_excluded, excluded_csv=folder / "excluded.csv"
    )


def ids(rows: list[ManifestRow]) -> list[str]:
    return [row.slide_id for row in rows]


def in_turn(group: TileGroup, folder: Path) -> list[object]:
    """What a rank's cohort says after each of a few events; one rank sees each fault."""
    cohort = make_cohort(folder, group, [folder / f"{at}.svs" for at in range(5)])
    cohort.tilings = dict.fromkeys((f"s{at}" for at in range(5)), Tiling(np.zeros((1, 2), np.int64), 1.0))
    seen: list[object] = []
    first = group.rank == 0
    cohort.exclude_faults(Fault("s0", "cannot be read now", passing=True) if first else Fault("s1", "damaged"))
    seen.append((ids(cohort.usable("train")), ids(cohort.expected("train")), cohort.lasting))
    # Of one slide, one rank sees damage, and the other nothing for sure.
    cohort.exclude_faults(Fault("s2", "not now", passing=True) if first else Fault("s2", "damaged"))
    cohort.exclude_faults(None if first else Fault("s0", "damaged after all"))
    cohort.exclude_faults(Fault("s3", "not now", passing=True) if first else None)
    cohort.try_again()
    seen.append((ids(cohort.usable("train")), cohort.lasting))
    cohort.exclude_faults(Fault("s4", "not now", passing=True) if first else None)
    cohort.hold()
    cohort.try_again()
    seen.append((ids(cohort.usable("train")), ids(cohort.expected("train")), sorted(cohort.lasting)))
    return seen


def test_what_cannot_be_read_now_is_tried_again_on_every_rank(world: Callable[[int], World], tmp_path: Path) -> None:
    one, other = world(2).run(in_turn, tmp_path)
    assert one == other
    assert one[0] == (["s2", "s3", "s4"], ["s0", "s2", "s3", "s4"], {"s1": "damaged"})
    assert one[1] == (["s3", "s4"], {"s1": "damaged", "s2": "damaged", "s0": "damaged after all"})
    assert one[2] == (["s3"], ["s3"], ["s0", "s1", "s2"])
    assert [row["slide_id"] for row in read_csv(tmp_path / "excluded.csv")] == ["s1", "s0", "s2", "s4"]


def test_a_slide_that_was_away_is_tiled_later(
    real_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "damaged.svs").write_bytes(b"not a slide")
    (tmp_path / "link.svs").symlink_to(real_slide)
    cohort = make_cohort(tmp_path, RankGroup(), [real_slide, tmp_path / "damaged.svs", tmp_path / "link.svs"])
    away = Away(monkeypatch, real_slide, 1000)
    with caplog.at_level("INFO"):
        cohort.tile(SPEC, tmp_path / "tilings", threads=2)
        assert ids(cohort.usable("train")) == ["s2"] and ids(cohort.expected("train")) == ["s0", "s2"]
        assert list(cohort.lasting) == ["s1"]
        cohort.try_again()
        assert ids(cohort.usable("train")) == ["s2"], "it is still away"
        away.left = 0
        cohort.try_again()
    assert ids(cohort.usable("train")) == ["s0", "s2"] and len(cohort.tilings) == 2
    assert [row["slide_id"] for row in read_csv(tmp_path / "excluded.csv")] == ["s1"]
    assert "1 slide, which could not be read before, is tried again" in caplog.text


def test_all_slides_are_looked_at_before_the_run_stops(tmp_path: Path) -> None:
    files = [tmp_path / f"{at}.svs" for at in range(60)]
    for path in files[:20]:
        path.write_bytes(b"not a slide")
    cohort = make_cohort(tmp_path, RankGroup(), files, max_excluded=0.1)
    with pytest.raises(UserError) as caught:
        cohort.tile(SPEC, tmp_path / "tilings", threads=2)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("60 of 60 slides are unusable, more than the share --data.max-excluded 0.1")
    assert lines[1] == "  40 × cannot open FILE: no such file (s20, s21, s22, …)"
    assert lines[2].startswith("  20 × cannot open FILE: it is not of a kind")
    assert lines[3].endswith("excluded.csv") and len(lines) == 4
    assert len(read_csv(tmp_path / "excluded.csv")) == 60


# ---- what is kept of a slide


def no_room(group: TileGroup, folder: Path, slides: list[Path]) -> str:
    """The error of a rank, where the folder of the tilings is a file."""
    try:
        make_cohort(folder, group, slides).tile(SPEC, folder / "tilings", threads=1)
    except UserError as error:
        return str(error)
    return "none"


def test_tilings_that_cannot_be_kept_end_every_rank_in_one_line(
    world: Callable[[int], World], real_slide: Path, tmp_path: Path
) -> None:
    (tmp_path / "tilings").write_text("")
    (message,) = set(world(2).run(no_room, tmp_path, [tmp_path / "none.svs", real_slide]))
    assert message.startswith(f"cannot keep tilings in {tmp_path}/tilings: ") and "\n" not in message


@pytest.mark.parametrize("content", [b"", b"PK", None])
def test_a_damaged_tiling_is_made_again(real_slide: Path, tmp_path: Path, content: bytes | None) -> None:
    expected = cached_tiling(real_slide, SPEC, tmp_path)
    (kept,) = tmp_path.iterdir()
    whole = bytearray(kept.read_bytes())
    whole[len(whole) // 2] ^= 1
    kept.write_bytes(bytes(whole) if content is None else content)
    np.testing.assert_array_equal(cached_tiling(real_slide, SPEC, tmp_path).coords, expected.coords)


@pytest.mark.parametrize("name", ["a" * 251 + ".svs", "病" * 83 + ".svs"])
def test_a_name_as_long_as_a_name_can_be(real_slide: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(real_slide)
    assert len(cached_tiling(tmp_path / name, SPEC, tmp_path / "tilings").coords) > 40
