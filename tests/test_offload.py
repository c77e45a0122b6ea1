"""Offload: the same gradients from tensors that left the device, each once, and memory that really falls."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from weakref import ref

import pytest
import torch
from timm.layers import set_reentrant_ckpt
from torch import Tensor, nn

from slidescale.engine.errors import UserError
from slidescale.engine.memory import offload, offload_disk, offload_host
from slidescale.engine.memory.offload import Offload
from slidescale.engine.memory.offload_disk import DiskOffload
from slidescale.engine.memory.offload_host import HostOffload
from slidescale.engine.memory.two_pass import Chunks, backpropagate, encode
from slidescale.engine.models.aggregator import Aggregator
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.slide_model import SlideModel

ENCODERS = ["test_resnet", "test_vit", "test_convnext"]
CHUNK = 16
Saving = Callable[[], AbstractContextManager[None]]

stores = pytest.mark.parametrize("store", ["disk", pytest.param("host", marks=pytest.mark.gpu)], indirect=True)


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Offload]:
    """Either tier: "disk" on the CPU, "host" on a GPU; for models so small that few of their tensors would leave."""
    monkeypatch.setattr(offload, "SMALLEST", 1024)
    if getattr(request, "param", "disk") == "host":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # or two equal backwards may differ
        made: Offload = HostOffload(torch.device("cuda"))
    else:
        made = DiskOffload(tmp_path, 0)
    yield made
    made.close()


def device_of(store: Offload) -> torch.device:
    return torch.device("cuda" if isinstance(store, HostOffload) else "cpu")


def make_model(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, autocast: torch.dtype | None = None
) -> SlideModel:
    torch.manual_seed(0)
    encoder = Encoder(name, tile_px=32)
    aggregator = Aggregator(encoder.dim, 2, pooling="mean", hidden_dim=4, attention_dim=4, dropout=0.0)
    return SlideModel(encoder, aggregator, autocast).to(device, dtype).train()


def make_chunks(k: int, device: torch.device, count: int | None = None) -> Chunks:
    tiles = torch.randint(0, 256, (k, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(k))
    return Chunks(tiles.to(device), CHUNK, count or -(-k // CHUNK), seed=0, offset=0)


def step(model: SlideModel, chunks: Chunks, saving: Saving) -> None:
    """Forward with every graph stored, and backward."""
    encoded = encode(model, chunks, chunks.count, saving)
    weights = torch.linspace(-1, 1, encoded.features.numel(), device=encoded.features.device)
    encoded.features.grad = weights.view_as(encoded.features).to(encoded.features.dtype)
    backpropagate(model, chunks, encoded, lambda loss: loss.backward())


def gradients(model: SlideModel) -> dict[str, Tensor]:
    """Of the encoder's parameters, taken from it."""
    found = {name: p.grad for name, p in model.encoder.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert found and any(bool(gradient.any()) for gradient in found.values()), "equality of zeros proves nothing"
    return found


def assert_same_gradients(model: SlideModel, chunks: Chunks, store: Offload) -> None:
    """Bitwise, with what is saved away and with it kept."""
    step(model, chunks, nullcontext)
    expected = gradients(model)
    before = store.bytes_out
    step(model, chunks, store.saving)
    store.clear()
    assert store.bytes_out > before, "something has really left"
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


@stores
@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_are_those_of_kept_graphs(encoder: str, store: Offload) -> None:
    model = make_model(encoder, device_of(store))
    for k in (37, 16, 49):
        assert_same_gradients(model, make_chunks(k, device_of(store)), store)
    assert store.bytes_back == store.bytes_out, "each storage came back once"


@stores
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_gradients_in_other_precisions(encoder: str, precision: str, store: Offload) -> None:
    options = {"dtype": torch.float64} if precision == "fp64" else {"autocast": torch.bfloat16}
    model = make_model(encoder, device_of(store), **options)
    assert_same_gradients(model, make_chunks(37, device_of(store)), store)


@stores
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_activation_checkpointing(encoder: str, reentrant: bool, store: Offload) -> None:
    model = make_model(encoder, device_of(store))
    step(model, make_chunks(37, device_of(store)), store.saving)
    whole = store.bytes_out
    store.clear()
    model.zero_grad()
    model.encoder.set_checkpointing(True)
    set_reentrant_ckpt(reentrant)
    try:
        assert_same_gradients(model, make_chunks(37, device_of(store)), store)
    finally:
        set_reentrant_ckpt(False)
    assert store.bytes_out - whole < whole, "only the blocks' inputs left"


@stores
def test_padding_chunks(store: Offload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1)
    model = make_model("test_resnet", device_of(store))
    assert_same_gradients(model, make_chunks(5, device_of(store), count=3), store)
    step(model, make_chunks(0, device_of(store), count=2), store.saving)
    assert all(p.grad is not None and not p.grad.any() for p in model.encoder.parameters()), "zeros, not none"


@stores
@pytest.mark.parametrize("encoder", ENCODERS)
def test_each_storage_leaves_once_and_parameters_never(encoder: str, store: Offload) -> None:
    model, chunks = make_model(encoder, device_of(store)), make_chunks(37, device_of(store))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held, unique, saved = [], {}, 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and storage.nbytes() >= offload.SMALLEST:
            held.append(tensor.detach())  # so that no address is used again
            unique[storage.data_ptr(), tensor._version] = storage.nbytes()
            saved += storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        encode(model, chunks, chunks.count)
    step(model, chunks, store.saving)
    assert store.bytes_out == store.bytes_back == sum(unique.values())
    shares = saved > sum(unique.values())
    assert shares == (encoder != "test_convnext"), "some are saved more than once, where the network does that at all"


@stores
def test_views_return_as_they_were(store: Offload) -> None:
    base = torch.randn(4, 3, 8, 8, device=device_of(store), dtype=torch.float64).to(memory_format=torch.channels_last)
    views = [
        base,
        base.permute(1, 0, 3, 2),
        base[1:, :, ::2],
        base[:, 0, 3:4],
        base.view(torch.int64),
        base.transpose(0, 1),
        base[:, 1:2].expand(4, 5, 8, 8),
    ]
    packed = [store._pack(view) for view in views]
    assert store.bytes_out == base.untyped_storage().nbytes(), "one copy for all"
    for view, found in zip(views, map(store._unpack, packed), strict=True):
        assert (found.shape, found.stride(), found.dtype) == (view.shape, view.stride(), view.dtype)
        assert found.storage_offset() == view.storage_offset()
        assert torch.equal(found, view)
    assert store.bytes_back == store.bytes_out, "and one way back"


@stores
def test_small_part_leaves_the_rest_behind(store: Offload) -> None:
    base = torch.randn(1000, 1000, device=device_of(store))
    large, small = base[500:600, 1:], base[3:4, 7:100]
    packed = [store._pack(large), store._pack(small)]
    assert store.bytes_out == (100 * 1000 - 1) * 4
    expected = [large.clone(), small.clone()]
    kept = packed[1].tensor  # type: ignore[union-attr]
    assert kept.untyped_storage().nbytes() < offload.SMALLEST, "the small one stays, without what it was cut from"
    for each, found, view in zip(expected, map(store._unpack, packed), (large, small), strict=True):
        assert torch.equal(found, each) and found.stride() == view.stride()


@stores
def test_parameters_and_their_views_stay(store: Offload) -> None:
    for trains in (True, False):
        weight = nn.Parameter(torch.randn(300, 300, device=device_of(store)), requires_grad=trains)
        assert store._unpack(store._pack(weight)) is weight
        found = store._unpack(store._pack(weight.t()))
        assert found.data_ptr() == weight.data_ptr() and found.stride() == (1, 300)
    assert store.bytes_out == 0


def in_place_gradient(store: Offload) -> tuple[Tensor, Tensor]:
    """The gradient of sin(x) + cos(x + 1), where x + 1 is written over x after the sine saved it; and the right one."""
    start = torch.randn(200, 300, dtype=torch.float64, device=device_of(store), requires_grad=True)
    with store.saving():
        x = start * 1
        y = x.sin()
        x += 1
        y = y + x.cos()
    y.sum().backward()
    store.clear()
    assert start.grad is not None
    return start.grad, start.detach().cos() - (start.detach() + 1).sin()


def test_storage_written_to_between_two_saves_leaves_twice(store: Offload) -> None:
    found, expected = in_place_gradient(store)
    assert torch.equal(found, expected)
    assert store.bytes_out == 2 * expected.nbytes


def test_versions_are_what_tells_the_two_apart(store: Offload, monkeypatch: pytest.MonkeyPatch) -> None:
    key = offload._key
    monkeypatch.setattr(offload, "_key", lambda *args: (*key(*args)[:1], 0, *key(*args)[2:]))
    found, expected = in_place_gradient(store)
    assert not torch.equal(found, expected), "the test above would have seen it"


def test_small_tensor_written_to_is_refused_as_by_autograd(store: Offload) -> None:
    start = torch.randn(7, requires_grad=True)
    with store.saving():
        x = start * 1
        y = x.sin()
        x += 1
    with pytest.raises(RuntimeError, match=r"size \[7\] .* modified by an in-place operation"):
        y.sum().backward()


def test_address_used_again_is_not_mistaken(store: Offload) -> None:
    packed, expected = [], []
    for value in range(8):
        tensor = torch.full((offload.SMALLEST,), float(value))  # mostly where the one before was
        packed.append(store._pack(tensor))
        expected.append(tensor.clone())
        del tensor
    for note, each in zip(packed, expected, strict=True):
        assert torch.equal(store._unpack(note), each)


def test_memory_falls_as_the_backward_goes(store: Offload) -> None:
    """What has come back is dropped with the last note of it, and not read again before."""
    size = 100_000
    packed = [store._pack(torch.full((size,), float(i))) for i in range(6)]
    twice = store._pack(store._unpack(packed[5]))  # a save of what is back is a save of its own
    first, again = store._unpack(packed[4]), store._unpack(packed[4])
    assert first.data_ptr() == again.data_ptr()
    assert store.bytes_back == 2 * 4 * size
    gone = ref(packed[4].away)  # type: ignore[union-attr]
    del first, again, packed[4:]
    assert gone() is None
    assert torch.equal(store._unpack(twice), torch.full((size,), 5.0))


def test_disk_reads_ahead_of_a_bounded_amount(store: Offload, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 4 * offload.SMALLEST
    monkeypatch.setattr(store, "_limit", 3 * size)
    packed = [store._pack(torch.full((size,), i, dtype=torch.uint8)) for i in range(10)]
    for i in reversed(range(10)):
        assert torch.equal(store._unpack(packed.pop()), torch.full((size,), i, dtype=torch.uint8))
        assert sorted(store._ahead) == list(range(max(0, i - 3), i))
    assert store.bytes_back == 10 * size


def test_storage_larger_than_all_buffers(store: Offload) -> None:
    content = torch.randint(0, 256, (3 * offload_disk.STAGE + 12_345,), dtype=torch.uint8)
    first, last = content[:5_000].clone(), content[-5_000:].clone()
    packed = [store._pack(each) for each in (first, content, last)]
    for note, each in zip(reversed(packed), (last, content, first), strict=True):
        assert torch.equal(store._unpack(note), each)


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


@stores
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_step_after_one_that_failed(when: str, store: Offload) -> None:
    model, chunks = make_model("test_resnet", device_of(store)), make_chunks(37, device_of(store))
    calls = 0

    def fail(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyError("in the middle")

    layer = model.encoder.backbone.layer2
    hook = layer.register_forward_hook(fail) if when == "forward" else layer.register_full_backward_hook(fail)
    with pytest.raises(KeyError, match="in the middle"):
        step(model, chunks, store.saving)
    assert calls == 2
    hook.remove()
    store.clear()
    model.zero_grad()
    assert_same_gradients(model, chunks, store)


@stores
def test_graph_of_a_step_that_ended_is_refused(store: Offload) -> None:
    tensor = torch.randn(offload.SMALLEST, device=device_of(store))
    note = store._pack(tensor)
    store.clear()
    again = store._pack(tensor)
    assert store.bytes_out == 2 * tensor.nbytes, "what the ended step knew is not known any more"
    with pytest.raises(RuntimeError, match=r"after Offload.clear"):
        store._unpack(note)
    assert torch.equal(store._unpack(again), tensor)


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


@pytest.mark.gpu
@pytest.mark.parametrize("store", ["host"], indirect=True)
def test_host_memory_is_used_again_from_step_to_step(store: HostOffload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_host, "SLAB", 1 << 20)  # so that storages lie across slabs
    monkeypatch.setattr(offload_host, "HOST_AHEAD", 1 << 20)
    model, chunks = make_model("test_resnet", device_of(store)), make_chunks(64, device_of(store))
    assert_same_gradients(model, chunks, store)
    slabs = [slab.data_ptr() for slab in store._slabs]
    assert len(slabs) > 1
    for _ in range(3):
        assert_same_gradients(model, chunks, store)
    assert [slab.data_ptr() for slab in store._slabs] == slabs


@pytest.mark.gpu
@pytest.mark.parametrize("store", ["host"], indirect=True)
def test_host_refuses_what_changed_on_its_way_out(store: HostOffload) -> None:
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        in_place_gradient(store)


@pytest.mark.gpu
@pytest.mark.parametrize("store", ["host"], indirect=True)
def test_device_memory_falls(store: HostOffload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_host, "HOST_AHEAD", 1 << 20)
    monkeypatch.setattr(store, "_limit", 1 << 20)
    device = device_of(store)
    model, chunks = make_model("test_resnet", device), make_chunks(40 * CHUNK, device)
    step(model, chunks, nullcontext)  # workspace, gradients
    peaks = []
    for saving in (nullcontext, store.saving):
        torch.cuda.reset_peak_memory_stats(device)
        step(model, chunks, saving)
        store.clear()
        peaks.append(torch.cuda.max_memory_allocated(device))
    assert peaks[0] - peaks[1] >= 0.7 * store.bytes_out
