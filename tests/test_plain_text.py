"""Output in encodings that lack some characters."""

import io
import sys

import pytest

from slidescale.engine.commands import cli
from slidescale.engine.process.plain_text import accept_any_encoding

PLAN = ["plan", "--model.encoder", "test_vit", "--data.tile-px", "160", "--k", "64", "--device", "cpu"]
PLAN += ["--memory", "8GiB"]


def stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


def written(to: io.TextIOWrapper) -> str:
    assert isinstance(to.buffer, io.BytesIO)
    return to.buffer.getvalue().decode(to.encoding)


@pytest.mark.parametrize(
    ("encoding", "text", "expected"),
    [
        ("ascii", "2 × cpu, 0.5 µm ± 1 − 2 … ≤ 3", "2 x cpu, 0.5 um +/- 1 - 2 ... <= 3"),
        ("ascii", "R² of Müller's ─┼─ 切片", "R2 of Muller's -+- ??"),
        ("latin-1", "2 × cpu, ≥ 3, Müller", "2 × cpu, >= 3, Müller"),
        ("utf-8", "2 × cpu ─ 切片", "2 × cpu ─ 切片"),
        ("utf-8", "a file\udce9.svs", "a file?.svs"),  # of a name that is not UTF-8
    ],
)
def test_what_an_encoding_lacks(encoding: str, text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, error = stream(encoding), stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", error)
    accept_any_encoding()
    print(text)
    print(text, file=sys.stderr)
    assert written(out) == written(error) == f"{expected}\n"


def test_plan_on_an_ascii_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = stream("ascii")
    monkeypatch.setattr(sys, "stdout", out)
    cli.main(PLAN)
    assert "2 x fp32 per trained parameter" in written(out)


def test_errors_on_an_ascii_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python itself writes the text of a SystemExit, to stderr as a command has left it."""
    error = stream("ascii")
    monkeypatch.setattr(sys, "stderr", error)
    with pytest.raises(SystemExit, match="Größe"):
        cli.main([*PLAN[:2], "Größe", *PLAN[3:]])
    assert error.errors == "plain"
