"""Settings that scale_k.py, strategies.py and weak_scaling.py share, and the page that they write."""

import argparse
from pathlib import Path

import torch

from slidescale.engine.training.place import has_bf16

PAGE = Path(__file__).parent.parent.parent / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Each section is written by the command that it names, not by hand; `make bench` runs the short ones.
"""


def add_common(parser: argparse.ArgumentParser, *, tile: int = 224, time_limit: float = 3600) -> None:
    """Add what is measured, on what, for how long, and where results go."""
    parser.add_argument("--encoder", default="resnet18", help="any timm model")
    parser.add_argument("--tile", type=int, default=tile, help="side of a tile, px")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 where the device has it")
    parser.add_argument("--time-limit", type=float, default=time_limit, help="per cell, s")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown page whose section is replaced")
    parser.add_argument("--no-page", action="store_true", help="write no page")


def add_chunk(parser: argparse.ArgumentParser) -> None:
    """Add `--chunk`, for commands that let it be chosen."""
    parser.add_argument(
        "--chunk", type=_chunk_size, default="auto", help="tiles that go through the encoder at once, or auto"
    )


def settle(parser: argparse.ArgumentParser, args: argparse.Namespace, *, ranks: int) -> None:
    """Refuse more ranks than there are GPUs, and choose the dtype where none is named."""
    if args.device == "cuda" and torch.cuda.device_count() < ranks:
        parser.error(f"--ranks {ranks}: PyTorch sees {torch.cuda.device_count()} GPUs here, and each rank needs one")
    args.dtype = args.dtype or ("bfloat16" if has_bf16(torch.device(args.device)) else "float32")


def _chunk_size(text: str) -> int | str:
    """Parse "auto" or a number of tiles."""
    if text == "auto" or int(text) > 0:
        return text if text == "auto" else int(text)
    raise ValueError(text)
