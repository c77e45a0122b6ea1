"""Tables of text as spreadsheets, R and pandas write them: comma, semicolon or tab between the cells of a row."""

import codecs
import csv
import io
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from slidescale.engine.errors import ManifestError
from slidescale.engine.supervision.cells import Record

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
# The line that Excel puts before the header to name the delimiter.
SEP_LINE = re.compile(r"\s*\"?sep=([^\r\n])\"?[,;\t]*\r?\n?", re.IGNORECASE)
# A line, of which quoted cells may hold line breaks.
LINE = re.compile(r'(?:[^"\r\n]|"[^"]*")*')


class Table(NamedTuple):
    """A header, and the rows that are not empty, with stripped cells; a cell that a row lacks is empty."""

    columns: list[str]
    records: list[Record]


def read_table(path: Path) -> Table:
    """Read a table.

    UTF-8, and UTF-16 with a byte order mark (Excel's "Unicode Text"). Any other encoding is refused: a guess would
    exchange letters of names without a warning.

    Raises:
        ManifestError: it cannot be read, is no such table, has no rows, has a column twice, or rows with more cells
            than the header has.
    """
    try:
        text = _decode(path, path.read_bytes())
    except OSError as error:
        raise ManifestError(f"cannot read the manifest {path}: {error.strerror}") from None
    lines = io.StringIO(text, newline="")
    delimiter = _delimiter(text)
    skipped = 0
    if SEP_LINE.match(text):
        lines.readline()
        skipped = 1
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: list[str] = []
    records: list[Record] = []
    too_long: list[int] = []
    begin = skipped + 1
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                pass
            elif not columns:
                columns = cells
            else:
                if any(cells[len(columns) :]):
                    too_long.append(begin)
                padded = cells + [""] * (len(columns) - len(cells))
                records.append((begin, {name: cell for name, cell in zip(columns, padded, strict=False) if name}))
            begin = skipped + reader.line_num + 1
    except csv.Error as error:
        raise ManifestError(f"{path} is not CSV: row {begin}: {error}") from None
    if repeated := [name for name, count in Counter(columns).items() if name and count > 1]:
        raise ManifestError(
            f"{path} has more than one column {', '.join(map(repr, repeated))}: which of them counts? Remove or rename "
            "the others"
        )
    if not columns or not records:
        raise ManifestError(f"{path} " + ("has a header and no rows" if columns else "is empty"))
    if too_long:
        shown = ", ".join(map(str, too_long[:10])) + ", …" * (len(too_long) > 10)
        raise ManifestError(
            f"{path}: row {shown}: more cells than the header, which has {len(columns)}; quote cells that have a "
            f"{DELIMITERS.get(delimiter, repr(delimiter))} in them"
        )
    return Table(columns, records)


def _decode(path: Path, content: bytes) -> str:
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise ManifestError(
            f"{path} is not {encoding.removesuffix('-sig').upper()} text: {error.reason} at byte {error.start}, in row "
            f'{row}. Save it as "CSV UTF-8" (in Excel), or by: iconv -f WINDOWS-1252 -t UTF-8'
        ) from None
    if "\0" in text:
        raise ManifestError(f'{path} is not text: it has NUL bytes. Save it as "CSV UTF-8" (in Excel)')
    return text


def _delimiter(text: str) -> str:
    """The delimiter that the header has most of, outside quotes."""
    if named := SEP_LINE.match(text):
        return named[1]
    header = next((line for match in LINE.finditer(text) if (line := match[0]).strip(",;\t ")), "")
    bare = re.sub(r'"[^"]*"', "", header)
    return max(DELIMITERS, key=bare.count)  # the first of equals: a comma
