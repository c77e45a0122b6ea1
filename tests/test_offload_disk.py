"""Activations on disk: what stays in memory, what is left on the disk, and a disk that is full."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slidescale.engine.errors import UserError
from slidescale.engine.memory import offload
from slidescale.engine.memory.offload_disk import DiskOffload
from slidescale.engine.memory.two_pass import encode

from support.offloading import assert_same_gradients, make_chunks, make_model, step


def test_small_tensors_stay(tmp_path: Path) -> None:
    store = DiskOffload(tmp_path, 0)
    for nbytes in (offload.SMALLEST - 1, offload.SMALLEST):
        tensor = torch.zeros(nbytes, dtype=torch.uint8)
        stays = store._unpack(store._pack(tensor)).data_ptr() == tensor.data_ptr()
        assert stays == (nbytes < 64 * 1024)
    assert store.bytes_out == 64 * 1024
    store.close()


def test_full_disk_is_told_and_the_next_step_is_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskOffload(tmp_path / "new", 0)
    model, chunks = make_model("test_resnet", torch.device("cpu")), make_chunks(37, torch.device("cpu"))

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match=r"/new: No space left on device.*--memory.offload-folder"):
            step(model, chunks, store.saving)
        store.clear()
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *args: 0)
        with pytest.raises(UserError, match=r"/new: the file ends too early"):
            step(model, chunks, store.saving)
        store.clear()
    model.zero_grad()
    assert_same_gradients(model, chunks, store)
    store.close()


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot keep activations in .*/file/folder: Not a directory"):
        DiskOffload(tmp_path / "file" / "folder", 0)


def test_nothing_is_left_on_disk(tmp_path: Path) -> None:
    store = DiskOffload(tmp_path, 0)
    model, chunks = make_model("test_resnet", torch.device("cpu")), make_chunks(37, torch.device("cpu"))
    encoded = encode(model, chunks, chunks.count, store.saving)
    assert encoded.graphs
    store._fetch(next(filter(None, (each() for each in store._order))))  # waits until all is written
    assert os.fstat(store._file.fileno()).st_size == store.bytes_out > 0
    assert not list(tmp_path.iterdir()), "the file has no name, even while it is in use"
    store.clear()
    assert os.fstat(store._file.fileno()).st_size == 0
    store.close()
    store.close()
    assert not list(tmp_path.iterdir())


GROWTH = """
import json, sys
from contextlib import nullcontext
from pathlib import Path
import torch
from slidescale.engine.memory.offload_disk import DiskOffload
from slidescale.engine.memory.two_pass import Chunks, backpropagate, encode
from slidescale.engine.memory.usage import GIB, peak_gib
from slidescale.engine.models.aggregator import Aggregator
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.slide_model import SlideModel

def peak():
    return peak_gib(torch.device("cpu")) * GIB

torch.set_num_threads(1)
encoder = Encoder("resnet18", tile_px=224)
aggregator = Aggregator(encoder.dim, 2, pooling="mean", hidden_dim=4, attention_dim=4, dropout=0.0)
model = SlideModel(encoder, aggregator).train()
chunks = Chunks(torch.randint(0, 256, (40, 224, 224, 3), dtype=torch.uint8), 4, 10, seed=0, offset=0)
store = DiskOffload(Path(sys.argv[2]), 0) if sys.argv[1] == "disk" else None
before = peak()
encoded = encode(model, chunks, chunks.count, store.saving if store else nullcontext)
encoded.features.grad = torch.ones_like(encoded.features)
backpropagate(model, chunks, encoded, lambda loss: loss.backward())
print(json.dumps({"growth": peak() - before, "out": store.bytes_out if store else 0}))
"""


def test_resident_memory_falls(tmp_path: Path) -> None:
    """In processes of their own, since a process's peak never falls. Small tensors and buffers account for the rest."""
    found = {}
    for policy in ("keep", "disk"):
        command = [sys.executable, "-c", GROWTH, policy, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
        assert done.returncode == 0, done.stderr
        found[policy] = json.loads(done.stdout)
    print(found)
    out = found["disk"]["out"]
    assert out > 500 * 1024**2
    assert found["keep"]["growth"] - found["disk"]["growth"] >= 0.7 * out
