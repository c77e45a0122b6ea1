"""Offload: resident memory really falls, and places that cannot hold activations are refused."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slidescale.engine.config import MemoryConfig
from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.memory import offload, offload_disk
from slidescale.engine.memory.offload_disk import DiskOffload
from slidescale.engine.memory.offload_host import HostOffload
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.training.plan import make_offload

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


def test_small_tensors_stay(tmp_path: Path) -> None:
    store = DiskOffload(tmp_path, 0)
    for nbytes in (offload.SMALLEST - 1, offload.SMALLEST):
        tensor = torch.zeros(nbytes, dtype=torch.uint8)
        stays = store._unpack(store._pack(tensor)).data_ptr() == tensor.data_ptr()
        assert stays == (nbytes < 64 * 1024)
    assert store.bytes_out == 64 * 1024
    store.close()


def test_file_that_may_not_grow_is_told(tmp_path: Path) -> None:
    store = DiskOffload(tmp_path, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    content = torch.zeros(2 * offload_disk.STAGE + 1, dtype=torch.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (offload_disk.STAGE + 4096, hard))
    try:
        with pytest.raises(UserError, match=r"File too large"):
            store._unpack(store._pack(content))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        store.close()


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot keep activations in .*/file/folder: Not a directory"):
        DiskOffload(tmp_path / "file" / "folder", 0)


def test_host_memory_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"host needs a GPU.*--memory.offload-to disk"):
        HostOffload(torch.device("cpu"))


def test_files_of_policy_offload_want_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name a folder"):
        make_offload(MemoryConfig(policy="offload"), Mesh())
    store = make_offload(MemoryConfig(policy="offload", offload_folder=tmp_path), Mesh())
    assert store is not None
    store.close()
    assert make_offload(MemoryConfig(policy="keep"), Mesh()) is None
