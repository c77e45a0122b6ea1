"""The help of every command: at once, and in lines that end where the terminal does."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from slidescale.engine.commands import recipe
from slidescale.engine.commands.command_line import fill
from slidescale.engine.config import Config, RunConfig

ROOT = Path(__file__).parent.parent
# Asks one after another for help, and prints which of the libraries that take seconds to import are there after each.
SCRIPT = """
import contextlib, io, json, runpy, sys
from slidescale.engine.commands import cli

def ask(line):
    words = line.split()
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        if words[0] == "slidescale":
            cli.main(words[1:])
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    return printed.getvalue()

sys.path.insert(0, "recipes")
slow = ("torch", "timm", "numpy", "deepspeed", "matplotlib", "scipy", "sklearn", "skimage", "openslide")
found = {}
for line in sys.argv[1:]:
    printed = ask(line)
    found[line] = {"imported": [name for name in slow if name in sys.modules], "printed": printed}
print(json.dumps(found))
"""
LINES = {
    "slidescale --help": "predict   predict slides with a trained run",
    "slidescale plan --help": "--memory",
    "slidescale predict --help": "--manifest",
    "slidescale heatmap --help": "--max-px",
    "slidescale export --help": "encoder.safetensors",
    "recipes/egfr.py --help": "--preset NAME starts from other settings: eagle",
    "recipes/k_study.py --help": "--frozen-encoder",
}


def test_help_imports_nothing_slow() -> None:
    """In one process, so that what one command imports is seen in all that follow."""
    command = [sys.executable, "-c", SCRIPT, *LINES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for line, expected in LINES.items():
        assert expected in found[line]["printed"], line
        assert not found[line]["imported"], line


@pytest.mark.parametrize("width", [80, 120])
def test_settings_are_grouped_by_subject_and_lines_end_at_the_terminals_edge(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    default = Config(run=RunConfig(name="t"))
    with pytest.raises(SystemExit):
        recipe.main(f"A recipe.\n\n    code.py\n\n{40 * 'word '}", default=default, demo=default, argv=["--help"])
    output = capsys.readouterr().out
    groups = [output.index(f" {name} options ") for name in ("run", "data", "model", "memory", "parallel", "optim")]
    assert groups == sorted(groups)
    lines = [line for line in output.splitlines() if not line.startswith("usage: ")]  # which has the program's path
    assert "\n\n\n" not in output and max(map(len, lines)) <= width
    text = [line.strip("│| ") for line in output.splitlines()]
    begin = next(number for number, line in enumerate(text) if line.startswith("--data.supervision"))
    help_lines = text[begin + 1 : text.index("--data.slide-column STR")]
    room = width - len("│       ") - len(" │")
    for line, following in pairwise(help_lines):
        assert len(line) + 1 + len(following.split()[0]) > room, f"broken too early: {line}"


def test_make_lists_its_commands() -> None:
    """Also where no command is given: a newcomer's first."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    words = ["make", "--no-print-directory"]
    shown = subprocess.run(words, cwd=ROOT, env=alone, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert set(re.findall(r"^  make (\S+)", shown, re.MULTILINE)) | {"help"} == set(phony[1].split())


def test_paragraphs_are_filled_and_code_is_left_alone() -> None:
    text = "One\ntwo three.\n\n    code --that  stays\n\n\nLast --model.no-pretrained.\n"
    assert fill(text, 12) == "One two\nthree.\n\n    code --that  stays\n\nLast\n--model.no-pretrained."
    assert not re.search("\n{3}", fill(text, 80))
