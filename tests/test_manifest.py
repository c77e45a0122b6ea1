"""The manifest is checked whole, before anything starts."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from slidescale.engine.config import DataConfig
from slidescale.engine.data.manifest import Manifest, read_manifest
from slidescale.engine.errors import ManifestError

HEADER = "slide_id,case_id,path,label,split\n"


def write(folder: Path, text: str) -> Path:
    for name in ("a.svs", "b.svs", "c.svs", "e.svs", "f.svs", "g.svs"):
        (folder / name).touch()
    manifest = folder / "m.csv"
    manifest.write_text(text, encoding="utf-8")
    return manifest


def test_good_manifest(tmp_path: Path) -> None:
    text = HEADER + "a,p1,a.svs,wt,train\nb,p2,b.svs,mut,train\n c ,p3,c.svs,mut,val\n"
    manifest = read_manifest(write(tmp_path, text), DataConfig(classes=("wt", "mut")))
    assert manifest.classes == ("wt", "mut")
    assert [row.target for row in manifest.rows] == [(0.0,), (1.0,), (1.0,)]
    assert [row.slide_id for row in manifest.split("val")] == ["c"], "cells are stripped"
    assert manifest.rows[0].path == tmp_path / "a.svs", "paths are relative to the manifest"


def test_classes_are_inferred_from_train(tmp_path: Path) -> None:
    text = HEADER + "a,p1,a.svs,wt,train\nb,p2,b.svs,mut,train\nc,p3,c.svs,other,val\n"
    with pytest.raises(
        ManifestError, match=r"row 4: label 'other' is not among the labels of the train split: mut, wt"
    ):
        read_manifest(write(tmp_path, text), DataConfig())


def test_other_columns(tmp_path: Path) -> None:
    text = "file,slide,EGFR,patient,set,age\na.svs,a,0,p1,train,61\nb.svs,b,1,p2,train,70\n"
    config = DataConfig(
        slide_column="slide", case_column="patient", path_column="file", label_column="EGFR", split_column="set"
    )
    assert read_manifest(write(tmp_path, text), config).classes == ("0", "1")


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    text = HEADER + (
        "a,p1,a.svs,wt,train\n"
        "a,p2,b.svs,mut,train\n"
        "c,p1,c.svs,mut,val\n"
        "d,p4,missing.svs,mut,val\n"
        "e,p5,e.svs,,test\n"
        "f,p6,f.svs,mutt,test\n"
        "g,p7,g.svs,mut,trian\n"
        "h,p8,g.svs,mut,val\n"
    )
    with pytest.raises(ManifestError) as caught:
        read_manifest(write(tmp_path, text), DataConfig(classes=("wt", "mut")))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("has 7 problems:")
    for expected in (
        "row 3: slide_id 'a' already stands in row 2",
        "row 4: case 'p1' is in split 'val', and in 'train' in row 2",
        f"row 5: no file {tmp_path / 'missing.svs'}",
        "row 6: label is empty",
        "row 7: label 'mutt' is not among data.classes: wt, mut, did you mean 'mut'?",
        "row 9: file g.svs already stands in row 8",
        "row 8: unknown split 'trian'; use train, val, test, did you mean 'train'?",
    ):
        assert f"  {expected}" in lines, str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,case_id,path,label,split\na,p,a.svs,0,train\n", r"no column 'slide_id' \(--data.slide-column\)"),
        (HEADER, "a header and no rows"),
        (HEADER + "a,p1,a.svs,0,train\nb,p2,b.svs,0,train\n", "one label, '0'"),
        (HEADER + "a,p1,a.svs,0,val\n", "no row is in split 'train'"),
    ],
)
def test_unusable(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read_manifest(write(tmp_path, text), DataConfig())


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="No such file"):
        read_manifest(tmp_path / "none.csv", DataConfig())


# ---- what spreadsheets write


def read(folder: Path, content: bytes | str, config: DataConfig | None = None) -> Manifest:
    path = write(folder, "")
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_manifest(path, config or DataConfig())


def told(folder: Path, content: bytes | str, config: DataConfig | None = None) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        read(folder, content, config)
    return [line.strip() for line in str(caught.value).splitlines()]


GOOD = HEADER + 'a,p1,a.svs,"w, t",Train\nb,p2,b.svs,mut, TRAIN \nc,p3,c.svs,mut,VAL\n'


@pytest.mark.parametrize(
    "content",
    [
        GOOD.encode(),
        GOOD.encode("utf-8-sig"),
        GOOD.encode("utf-16"),
        GOOD.replace("\n", "\r\n").encode(),
        GOOD.replace(",", ";").replace("w; t", "w, t").encode(),
        GOOD.replace(",", "\t").replace("w\t t", "w, t").encode("utf-16"),
        b"sep=,\r\n" + GOOD.encode(),
        "\ufeffsep=;\n".encode() + GOOD.replace(",", ";").replace("w; t", "w, t").encode(),
        ("\n" + GOOD + ",,,,\n,,,,\n\n").encode(),
        GOOD.replace("path,", '"path",').encode(),
    ],
    ids=["plain", "BOM", "UTF-16", "CRLF", "semicolons", "tabs", "sep", "BOM sep", "empty rows", "quoted header"],
)
def test_tables_of_spreadsheets_and_splits_in_any_case(tmp_path: Path, content: bytes) -> None:
    manifest = read(tmp_path, content)
    assert manifest.classes == ("mut", "w, t")
    assert [row.split for row in manifest.rows] == ["train", "train", "val"]


def test_a_quoted_header_does_not_decide_what_separates(tmp_path: Path) -> None:
    header = 'slide_id;case_id;path;label;split;"notes, of, many, many, many, kinds"\n'
    assert len(read(tmp_path, header + "a;p1;a.svs;0;train;x\nb;p2;b.svs;1;train;\n").rows) == 2


def test_rows_have_the_numbers_of_the_file_s_lines(tmp_path: Path) -> None:
    text = HEADER.replace("\n", ",note\n") + 'a,p1,a.svs,0,train,"two\nlines"\n\n,,,,,\nb,p2,b.svs,1,trian,\n'
    assert "row 6: unknown split 'trian'; use train, val, test, did you mean 'train'?" in told(tmp_path, text)
    assert "row 7: unknown split 'trian'; use train, val, test, did you mean 'train'?" in told(
        tmp_path, "sep=,\n" + text
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER.replace("\n", ",label\n") + "a,p1,a.svs,0,train,1\n", "more than one column 'label'"),
        ("slide_id,case_id,path,label,split ,split\na,p1,a.svs,0,train,val\n", "more than one column 'split'"),
        (HEADER + "a,p1,a,svs,0,train\n", "row 2: more cells than the header, which has 5; quote .* a comma"),
        (HEADER + 'a,p1,"a.svs,0,train\nb,p2,b.svs,1,train\n', "is not CSV: row 2: unexpected end of data"),
        (HEADER.encode() + b"a,p1,a.svs,K\xfcrzel,train\n", "is not UTF-8 text: .* in row 2. Save it as .CSV UTF-8"),
        (HEADER.encode("utf-16-le"), "NUL bytes"),
        (b"", "is empty"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, content: bytes | str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read(tmp_path, content)


def test_a_column_has_one_role(tmp_path: Path) -> None:
    (line,) = told(tmp_path, GOOD, DataConfig(label_column="split"))
    assert "one column has two roles: 'split' of --data.split-column and --data.label-column" in line


@pytest.mark.parametrize("split", ["training", "Validation", "testing"])
def test_a_longer_name_of_a_split_is_guessed(tmp_path: Path, split: str) -> None:
    lines = told(tmp_path, GOOD + f"e,p5,e.svs,mut,{split}\n")
    assert any(line.startswith(f"row 5: unknown split {split!r}") and "did you mean" in line for line in lines)


# ---- what is missing


@pytest.mark.parametrize("cell", ["NA", "N/A", "nan", "NaN", "None", "null", "#N/A", "<NA>"])
def test_a_missing_label_is_no_class_and_a_missing_patient_none(tmp_path: Path, cell: str) -> None:
    lines = told(tmp_path, GOOD + f"e,{cell},e.svs,{cell},train\nf,{cell},f.svs,mut,val\n")
    assert lines[1:] == [
        f"row 5: case_id is missing: {cell!r}",
        f"row 5: label is missing: {cell!r}",
        f"row 6: case_id is missing: {cell!r}",
    ]


def test_a_class_may_be_called_none(tmp_path: Path) -> None:
    text = GOOD + "e,p5,e.svs,None,train\nf,p6,f.svs,Unknown,train\n"
    classes = ("w, t", "mut", "None", "Unknown")
    assert [row.target for row in read(tmp_path, text, DataConfig(classes=classes)).rows][-2:] == [(2.0,), (3.0,)]
    renamed = DataConfig(label_map={"None": "healthy"})
    assert read(tmp_path, text, renamed).classes == ("Unknown", "healthy", "mut", "w, t")


# ---- many of a kind


def test_many_problems_of_a_kind_are_counted(tmp_path: Path) -> None:
    rows = [f"s{i},p{i},slides/{i}.svs,{i % 2},{'train' if i % 3 else 'trian'}\n" for i in range(2000)]
    lines = told(tmp_path, HEADER + "".join(rows))
    assert lines[0].endswith("has 2667 problems:") and len(lines) < 12
    at = lines.index(f"2000 of 2000 rows: no slide file (paths are relative to {tmp_path}), such as:")
    assert lines[at + 1] == f"row 2: no file {tmp_path / 'slides/0.svs'}"
    assert "667 of 2000 rows: an unknown split (use train, val, test), such as:" in lines


def test_a_path_that_is_no_file_is_a_problem_of_its_row(tmp_path: Path) -> None:
    (tmp_path / "folder.svs").mkdir()
    lines = told(tmp_path, GOOD + f"e,p5,folder.svs,mut,val\nf,p6,{'x' * 300}.svs,mut,val\n")
    assert lines[1] == f"row 5: no file {tmp_path / 'folder.svs'}: is a folder"
    assert lines[2].startswith("row 6: no file") and lines[2].endswith("File name too long")


# ---- one slide twice


def content(seed: int, size: int = 1_000_000) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def other_name(folder: Path, how: str) -> str:
    """The slide a.svs under another name."""
    match how:
        case "spelling":
            return f"../{folder.name}/./a.svs"
        case "absolute":
            return str(folder / "a.svs")
        case "symbolic link":
            (folder / "other.svs").symlink_to("a.svs")
        case "hard link":
            (folder / "other.svs").hardlink_to(folder / "a.svs")
        case "copy":
            shutil.copy(folder / "a.svs", folder / "other.svs")
    return "other.svs"


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("how", ["spelling", "absolute", "symbolic link", "hard link", "copy"])
def test_one_slide_under_two_names(tmp_path: Path, how: str, split: str) -> None:
    path = write(tmp_path, GOOD)
    (tmp_path / "a.svs").write_bytes(content(0))
    name = other_name(tmp_path, how)
    path.write_text(GOOD + f"e,p5,{name},mut,{split}\n")
    what = "a copy of the file" if how == "copy" else "the same file"
    with pytest.raises(
        ManifestError, match=rf"row 5: file {name}, in split '{split}', is {what} a.svs, in 'train' in row 2"
    ):
        read_manifest(path, DataConfig())


def test_slides_of_one_size_and_one_beginning_are_not_one(tmp_path: Path) -> None:
    """As uncompressed ones of empty glass at their beginning, middle and end."""
    path = write(tmp_path, GOOD)
    whole = bytearray(10_000_000)
    for name in "abc":
        whole[4_000_000:4_200_000] = content(ord(name), 200_000)
        (tmp_path / f"{name}.svs").write_bytes(whole)
    assert len(read_manifest(path, DataConfig()).rows) == 3


def element(group: int, number: int, kind: str, value: bytes, undefined: bool = False) -> bytes:
    """Of a DICOM dataset in explicit VR, little endian."""
    length = 0xFFFFFFFF if undefined else len(value)
    form = "<HH2sHI" if kind in ("SQ", "OB") else "<HH2sH"
    fields = (0, length) if kind in ("SQ", "OB") else (length,)
    return struct.pack(form, group, number, kind.encode(), *fields) + value


def dicom(series: str, instance: int, undefined: bool) -> bytes:
    """A head, with the series of a referenced image before its own."""
    inner = element(0x20, 0xE, "UI", b"9.9.9\0")
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF if undefined else len(inner)) + inner
    if undefined:
        item += struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return (
        bytes(128)
        + b"DICM"
        + element(2, 1, "OB", b"\0\1")
        + element(8, 0x18, "UI", b"1.2.%d\0" % instance)
        + element(8, 0x1115, "SQ", item, undefined)
        + element(0x20, 0xD, "UI", b"1.2.3\0")
        + element(0x20, 0xE, "UI", series.encode())
        + element(0x20, 0x11, "IS", b"1 ")
        + bytes(100 + instance)
    )


@pytest.mark.parametrize("undefined", [False, True])
def test_images_of_one_dicom_series(tmp_path: Path, undefined: bool) -> None:
    path = write(tmp_path, GOOD.replace(".svs", ".dcm"))
    for index, name in enumerate("abc"):
        (tmp_path / f"{name}.dcm").write_bytes(dicom(f"1.{index}\0", index, undefined))
    assert len(read_manifest(path, DataConfig()).rows) == 3
    (tmp_path / "c.dcm").write_bytes(dicom("1.0\0", 2, undefined))
    with pytest.raises(
        ManifestError, match=r"row 4: file c.dcm, in split 'val', is of the same DICOM series as the file a.dcm"
    ):
        read_manifest(path, DataConfig())


@pytest.mark.parametrize(("one", "other"), [("TCGA-05", "tcga-05"), ("12", "12.0"), ("007", "7"), ("A  1", "a 1")])
def test_one_patient_under_two_names(tmp_path: Path, one: str, other: str) -> None:
    lines = told(tmp_path, GOOD + f"e,{one},e.svs,mut,train\nf,{other},f.svs,mut,val\n")
    assert lines[1:] == [
        f"row 6: case {other!r} is in split 'val', and {one!r}, most likely the same one, in 'train' in row 5"
    ]
    assert read(tmp_path, GOOD + f"e,{one},e.svs,mut,train\nf,{other},f.svs,mut,train\n")
