"""Which tests go to one worker, where several share them (pytest-xdist)."""

import ast
from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

WORLDS = "worlds"


class ByWorlds(LoadScopeScheduling):
    """A file's tests go to one worker, except that all tests in worlds of ranks go to the same one.

    It starts each world once, and no other worker starts any.
    """

    def _split_scope(self, nodeid: str) -> str:
        return group_of(self.config.rootpath, nodeid)


def group_of(root: Path, nodeid: str) -> str:
    """The name of the file without `test_`, or `WORLDS`."""
    file, _, name = nodeid.partition("::")
    path = root / file
    return WORLDS if name.partition("[")[0] in names_in_worlds(path) else path.stem.removeprefix("test_")


@cache
def names_in_worlds(path: Path) -> frozenset[str]:
    """Functions of a file that take the fixture `world`, or one that takes it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    takes = {
        each.name: {argument.arg for argument in (*each.args.args, *each.args.kwonlyargs)}
        for each in tree.body
        if isinstance(each, ast.FunctionDef)
    }
    found = {"world"}
    while more := {name for name, arguments in takes.items() if arguments & found} - found:
        found |= more
    return frozenset(found)
