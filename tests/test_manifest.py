"""The manifest is checked whole, before anything starts."""

from pathlib import Path

import pytest

from slidescale.engine.config import DataConfig
from slidescale.engine.data.manifest import read_manifest
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
