"""The exported encoder gives the run's features without this project: timm alone loads it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from slidescale.engine.commands.export import ExportRequest, export_encoder
from slidescale.engine.commands.trained import load_run
from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.models.foundation import FOUNDATION_MODELS

from support.runs import write_run

# Largest difference over the largest feature. Without adapters the same operators run on the same values; a merged
# adapter rounds a sum of weights where an unmerged one rounds a sum of outputs.
TOLERANCE = 1e-6

ALONE = """
import json, sys
import numpy as np
description = json.load(open("encoder.json"))
import torch
torch.set_num_threads(1)
scope = {"tiles": torch.from_numpy(np.load("tiles.npy"))}
with torch.no_grad():
    exec("\\n".join(description["python"]), scope)
np.save("features.npy", scope["features"].numpy())
assert not [name for name in sys.modules if name.startswith(("slidescale", "peft"))]
"""


def tiles(side: int) -> torch.Tensor:
    """uint8 `[5, side, side, 3]`."""
    return torch.randint(0, 256, (5, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def features_alone(folder: Path, tiles: torch.Tensor) -> np.ndarray:
    """Of the tiles, in a process that follows the description to the letter, and has nothing of this project's."""
    np.save(folder / "tiles.npy", tiles.permute(0, 3, 1, 2).numpy())
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "features.npy")


def error(folder: Path, out: Path) -> float:
    """Of the exported encoder's features beside the run's own."""
    run = load_run(folder, torch.device("cpu"))
    seen = tiles(run.config.data.tile_px)
    with torch.no_grad():
        expected = run.model.encode(seen).numpy()
    assert expected.std(axis=0).mean() > 1e-3, "tiles are told apart"
    return float(np.abs(features_alone(out, seen) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    "model",
    [
        {"encoder": "test_resnet", "drop_path": 0.1},
        {"encoder": "test_vit"},
        {"encoder": "test_vit", "lora_rank": 4},
        {"encoder": "test_convnext", "lora_rank": 2, "drop_path": 0.1},
        {"encoder": "uni2"},
        {"encoder": "virchow2", "lora_rank": 2},
    ],
    ids=lambda model: "-".join(map(str, model.values())),
)
def test_timm_alone_gives_the_same_features(
    small_foundation_models: None, tmp_path: Path, model: dict[str, Any]
) -> None:
    foundation = model["encoder"] in FOUNDATION_MODELS
    folder = write_run(tmp_path / "r", tile_px=56 if foundation else 64, **model)
    out = tmp_path / "out" / "encoder.safetensors"
    export_encoder(ExportRequest(run=folder, out=out))
    assert error(folder, out.parent) <= TOLERANCE
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    description = json.loads(out.with_suffix(".json").read_text())
    name = FOUNDATION_MODELS[model["encoder"]].architecture if foundation else model["encoder"]
    assert (description["timm_name"], description["tile_px"]) == (name, 56 if foundation else 64)
    assert description["mpp_um"] == 0.5
    for key, value in description.items():
        assert metadata[key] == value or json.loads(metadata[key]) == value
    assert ("img_size" in description["options"]) == (foundation or name == "test_vit")
    assert not [name for name in load_file(out) if "lora" in name or "base_layer" in name]


def test_the_comparison_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters that are taken away and not merged are found."""
    from peft.tuners.lora.layer import Linear

    folder = write_run(tmp_path / "r", encoder="test_vit", lora_rank=4)
    with monkeypatch.context() as patch:
        patch.setattr(Linear, "merge", lambda self: None)
        export_encoder(ExportRequest(run=folder, out=tmp_path / "encoder.safetensors"))
    assert error(folder, tmp_path) > 100 * TOLERANCE


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", encoder="test_vit")
    (tmp_path / "e.safetensors").mkdir()
    for out in (folder / "config.json" / "e.safetensors", tmp_path / "e.safetensors"):
        with pytest.raises(UserError, match=f"cannot write {out}"):
            export_encoder(ExportRequest(run=folder, out=out))


def test_nothing_is_written_over_what_is_no_export(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", encoder="test_vit")
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    (tmp_path / "other.json").write_text("{}")
    places = {
        folder / "model.safetensors": "is an input",
        tmp_path / "mine.safetensors": "no earlier export",
        tmp_path / "other.safetensors": "is no such result",
    }
    before = {path: path.read_bytes() for path in places if path.exists()}
    for out, reason in places.items():
        with pytest.raises(UserError, match=f"cannot write {out}: .*{reason}"):
            export_encoder(ExportRequest(run=folder, out=out))
    assert before == {path: path.read_bytes() for path in places if path.exists()}
    for _ in range(2):  # its own it writes again
        export_encoder(ExportRequest(run=folder, out=tmp_path / "encoder.safetensors"))
    plain = tmp_path / "plain"
    plain.touch()
    for name in ("encoder.safetensors", "encoder.json"):
        assert (tmp_path / name).stat().st_mode == plain.stat().st_mode, "whoever may read new files may read it"


def test_another_ending(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must end in .safetensors"):
        ExportRequest(run=tmp_path, out=Path("encoder.pth"))
