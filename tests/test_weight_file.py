"""Files of weights as they are found: wrapped, prefixed, damaged, or not weights at all."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from slidescale.engine.errors import ConfigError
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.weight_file import read_weight_file


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Of a small transformer, without a classifier."""
    torch.manual_seed(1)
    return timm.create_model("test_vit", num_classes=0, img_size=32).state_dict()


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def wrapped(state: dict[str, Tensor], form: str) -> Any:
    """A checkpoint as a trainer writes it; beside the weights there is what is not them."""
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    head = {"head.mlp.0.weight": torch.zeros(3), "head.last_layer.weight_g": torch.zeros(3)}
    match form:
        case "dino":
            student = prefixed(prefixed(other, "backbone."), "module.") | prefixed(head, "module.")
            args = argparse.Namespace(lr=1.0, output_dir=Path("out"), best=np.float64(0.5), epochs=np.int64(3))
            return {"student": student, "teacher": prefixed(state, "backbone.") | head, "epoch": 3, "args": args}
        case "dinov2":
            return {"teacher": prefixed(state, "backbone.") | prefixed(head, "dino_")}
        case "lightning":
            return {
                "state_dict": prefixed(state, "model.encoder.") | {"model.head.weight": torch.zeros(3)},
                "epoch": 3,
                "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
            }
        case "model_state_dict":
            return {"model_state_dict": state, "optimizer_state_dict": {"state": {}}}
        case "ddp":
            return {"model": prefixed(state, "module."), "optimizer": {"state": {}}}
        case _:
            return state


@pytest.mark.parametrize("form", ["plain", "dino", "dinov2", "lightning", "model_state_dict", "ddp"])
def test_checkpoints_of_trainers_load(state: dict[str, Tensor], tmp_path: Path, form: str) -> None:
    torch.save(wrapped(state, form), tmp_path / "checkpoint.pth")
    encoder = Encoder("test_vit", tile_px=32, weights=tmp_path / "checkpoint.pth")
    assert all(torch.equal(value, state[name]) for name, value in encoder.backbone.state_dict().items())


def test_a_network_that_is_there_twice_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(prefixed(state, "a.") | prefixed(state, "b."), tmp_path / "two.pth")
    with pytest.raises(ConfigError, match=r"two.pth has the network more than once, under a\. and b\."):
        read_weight_file(tmp_path / "two.pth", state.keys())
    teacher = {name: value + 1 for name, value in state.items()}
    torch.save(prefixed(state, "student.") | prefixed(teacher, "teacher."), tmp_path / "pair.pth")
    found = read_weight_file(tmp_path / "pair.pth", state.keys())
    assert torch.equal(found["norm.weight"], teacher["norm.weight"])


def test_names_of_the_file_are_told(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({f"layer{index}.w": torch.zeros(2) for index in range(5)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"not in the file, such as cls_token; the file has layer0.w, layer1.w, lay"):
        Encoder("test_vit", tile_px=32, weights=tmp_path / "other.pth")
    torch.save({"epoch": 3, "note": "none"}, tmp_path / "none.pth")
    with pytest.raises(ConfigError, match=r"none.pth holds no tensors by name: the file has epoch, note"):
        read_weight_file(tmp_path / "none.pth", state.keys())


class Harmful:
    """Leaves a file behind as it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("suffix", ["pth", "bin", "safetensors"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b"", "is empty"),
        (POINTER.encode(), "is a pointer of Git LFS and not the file itself"),
        (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "is a page of the web and not the file itself"),
        (b"no weights at all, but text", "is cut short or damaged, or not a file of weights"),
        (0.3, "is cut short or damaged, or not a file of weights"),
        (0.999, "is cut short or damaged, or not a file of weights"),
    ],
)
def test_files_that_are_not_weights(
    state: dict[str, Tensor], tmp_path: Path, suffix: str, damage: bytes | float, message: str
) -> None:
    path = tmp_path / f"weights.{suffix}"
    if isinstance(damage, float):
        save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
        path.write_bytes(path.read_bytes()[: int(damage * path.stat().st_size)])
    else:
        path.write_bytes(damage)
    with pytest.raises(ConfigError, match=rf"^model.weights: {path} {message}") as caught:
        Encoder("test_vit", tile_px=32, weights=path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_runs_nothing(state: dict[str, Tensor], tmp_path: Path, old_format: bool) -> None:
    path, trace = tmp_path / "harmful.pth", tmp_path / "trace"
    torch.save({"a": Harmful(trace), **state}, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ConfigError, match="harmful.pth is a pickle of more than tensors, which would run code"):
        read_weight_file(path, state.keys())
    assert not trace.exists()


def test_values_must_be_finite(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state | {"norm.weight": torch.full_like(state["norm.weight"], torch.nan)}, tmp_path / "nan.pth")
    with pytest.raises(ConfigError, match=r"nan.pth has values that are not finite \(NaN or infinite\), in norm.weig"):
        Encoder("test_vit", tile_px=32, weights=tmp_path / "nan.pth")
