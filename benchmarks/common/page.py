"""Pages of results: Markdown in which each command replaces its own section."""

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from slidescale.engine.files import write_text


def write_section(page: Path, head: str, name: str, text: str) -> None:
    """Replace one section of a page, or add it; a new page begins with `head`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    content = page.read_text(encoding="utf-8") if page.exists() else head
    if begin not in content:
        content += f"\n{begin}{end}"
    before, rest = content.split(begin)
    write_text(page, f"{before}{begin}{text.strip()}\n{end}{rest.split(end)[1]}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table as Markdown; cells stay as they are written."""
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
