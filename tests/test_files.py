"""Files are written whole or not at all, over plain files only, and under names that fit."""

import csv
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from slidescale.engine.files import (
    NAME_BYTES,
    check_output,
    check_replaceable,
    file_name,
    point,
    replacing,
    save_png,
    write_csv,
    write_text,
)

IDS = [
    "S-001",
    "TCGA-05-4244-01Z-00-DX1",
    "H21/1234",
    "H21_1234",
    "../../../escaped",
    "/tmp/abs",
    ".",
    "..",
    "",
    ".hidden",
    "-rf",
    "a" * 300,
    "a" * 299 + "b",
    "病" * 100,
    "Präparat 7",
    "EGFR+/L858R",
    "tab\there",
    "nul\0",
    "a.",
    "a ",
    "con:1",
    "x-0123456789abcdef",
    "=1+1",
    "\udcff",
]


def test_file_names_are_of_one_folder_bounded_and_all_different(tmp_path: Path) -> None:
    names = [file_name(each) for each in IDS]
    assert len(set(names)) == len(IDS)
    for name in names:
        assert Path(name).name == name and len(name.encode()) <= NAME_BYTES
        write_text(tmp_path / f"{name}_attention.geojson", "")
    assert len(list(tmp_path.iterdir())) == len(IDS)


@pytest.mark.parametrize("name", ["S-001", "TCGA-05-4244-01Z-00-DX1", "Präparat 7", "病理"])
def test_ordinary_names_stay_as_they_are(name: str) -> None:
    assert file_name(name) == name


def test_a_name_that_looks_like_another_s_is_not_it() -> None:
    other = file_name("a/b")
    assert file_name(other) != other


def test_a_file_that_cannot_be_finished_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("before")

    def fail() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["table.csv"]


def test_files_have_the_mode_that_the_user_s_mask_leaves(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_text(tmp_path / "new", "")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_nothing_of_the_user_s_is_lost(tmp_path: Path) -> None:
    (tmp_path / "precious.tmp").write_text("mine")
    (tmp_path / "precious.csv.unfinished").write_text("mine")
    write_csv(tmp_path / "precious.csv", ["a"], [["b"]])
    assert (tmp_path / "precious.tmp").read_text() == (tmp_path / "precious.csv.unfinished").read_text() == "mine"


def test_what_is_not_a_plain_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real.csv").write_text("mine")
    (tmp_path / "link").symlink_to("real.csv")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("link", "real.csv"), ("dangling", "nowhere"), ("folder", "folder"), ("pipe", "device")):
        with pytest.raises(FileExistsError, match=reason):
            write_csv(tmp_path / name, ["a"], [])
    with pytest.raises(FileExistsError, match="device"):
        check_replaceable(Path("/dev/null"))
    assert (tmp_path / "real.csv").read_text() == "mine" and not (tmp_path / "nowhere").exists()
    assert (tmp_path / "link").is_symlink() and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_an_output_is_no_input_and_no_file_of_another_kind(tmp_path: Path) -> None:
    source, other = tmp_path / "in.csv", tmp_path / "other.csv"
    source.write_text("slide_id,path,label\n")
    (tmp_path / "hard").hardlink_to(source)
    for out in (source, tmp_path / "x" / ".." / "in.csv", tmp_path / "hard"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(FileExistsError, match="is an input"):
            check_output(out, [other, source], begins=b"slide_id,path,")
    other.write_text("name,score\n")
    with pytest.raises(FileExistsError, match="is no such result"):
        check_output(other, [source], begins=b"slide_id,path,")
    other.write_text("")
    check_output(other, [source], begins=b"slide_id,path,")
    check_output(tmp_path / "new.csv", [source], begins=b"slide_id,path,")


def test_a_table_has_no_formulas(tmp_path: Path) -> None:
    cells = ["=HYPERLINK(1)", "+49", "-x", "@cmd", "-0.5", "1e-3", "S-001", "", -2.5, None]
    write_csv(tmp_path / "t.csv", ["=name"], [cells])
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        header, row = csv.reader(file)
    assert header == ["'=name"]
    assert row == ["'=HYPERLINK(1)", "+49", "'-x", "'@cmd", "-0.5", "1e-3", "S-001", "", "-2.5", ""]


def test_a_picture_keeps_its_format(tmp_path: Path) -> None:
    save_png(np.zeros((2, 3, 3), np.uint8), tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_link_names_what_it_is_pointed_at_last(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / ".last").symlink_to("nothing")  # a process that was killed has left it
    for name in ("one", "two"):
        point(tmp_path / "last", tmp_path / name)
        assert (tmp_path / "last").resolve() == tmp_path / name
    assert os.readlink(tmp_path / "last") == "two", "also after the folder has moved"
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "last"}
