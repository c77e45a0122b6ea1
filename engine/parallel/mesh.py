"""Starting up: which ranks there are, which device each computes on, and who shares a slide with whom."""

import ipaddress
import os
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.parallel.tile_parallel import TileGroup

# Ranks wait for each other while one searches a large slide for tissue or writes a checkpoint. A rank that has died
# is noticed at once, by its closed connection; this ends only a world in which one hangs.
PATIENCE = timedelta(hours=2)


def local_ranks() -> int:
    """The number of ranks on this machine, which torchrun and DeepSpeed's launcher call differently."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))


def check_launcher() -> None:
    """Refuse to train alone, several times over, when a launcher has started several processes without ranks.

    Raises:
        UserError: srun or mpirun did.
    """
    started = max(int(os.environ.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    if "RANK" not in os.environ and started > 1:
        raise UserError(
            f"{started} processes were started by srun or mpirun, and none knows its rank: let it start one torchrun "
            "per machine (docs/slurm.sh)"
        )


def pick_device(local_rank: int = -1) -> torch.device:
    """This rank's GPU where there are GPUs, else the CPU, of which local ranks get equal parts.

    Args:
        local_rank: where no launcher says it by LOCAL_RANK; a negative one stands for the first.

    Raises:
        ConfigError: more ranks on this machine than GPUs.
    """
    if not torch.cuda.is_available():
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks()))
        return torch.device("cpu")
    if local_ranks() > torch.cuda.device_count():
        raise ConfigError(f"{local_ranks()} ranks were started on a machine with {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", max(0, local_rank))))
    torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Mesh:
    """All ranks as S rows of T: the ranks of a row share one slide's tiles, and each row has a slide of its own.

    `Mesh()` is one process alone, on the CPU; `join` makes the one of a world.

    Attributes:
        world: all S × T ranks.
        tiles: this rank's row.
        device_mesh: the same as PyTorch knows it, with dimensions "slides" and "tiles"; None for one process alone.
        device: that this rank computes on.
    """

    world: RankGroup = field(default_factory=RankGroup)
    tiles: TileGroup = field(default_factory=TileGroup)
    device_mesh: DeviceMesh | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def slides(self) -> int:
        """S, the number of slides side by side."""
        return self.world.size // self.tiles.size

    @property
    def slide(self) -> int:
        """Which of the S this rank works on."""
        return self.world.rank // self.tiles.size


def join(tile_ranks: int | str = "all", *, device: torch.device | None = None, alone: bool | None = None) -> Mesh:
    """Meet the other ranks that torchrun or DeepSpeed's launcher has started.

    Args:
        tile_ranks: T, ranks that share a slide; it divides the number of ranks. "all": all of them.
        device: that this rank computes on; None: `pick_device`'s.
        alone: True: this process alone, without a world; False: a world also of one process, as strategies other than
            "single" need it; None: alone where no launcher has started other processes.

    Raises:
        UserError: they cannot meet, for example because the port is taken; or their number does not fit.
    """
    check_launcher()
    device = pick_device() if device is None else device
    if alone is None:
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1 and not dist.is_initialized()
    if alone:
        return Mesh(device=device)
    start_world(device)
    if tile_ranks != "all" and dist.get_world_size() % int(tile_ranks):
        raise ConfigError(f"{tile_ranks} ranks per slide: must divide the number of ranks, {dist.get_world_size()}")
    return make_mesh(device, tile_ranks)


def make_mesh(device: torch.device, tile_ranks: int | str) -> Mesh:
    """Arrange the ranks of a started world; ranks that share a slide have neighbouring numbers, and so a machine.

    Args:
        tile_ranks: T, or "all"; it divides the number of ranks.
    """
    return _arrange(device, dist.get_world_size() if tile_ranks == "all" else int(tile_ranks))


@cache  # groups of ranks are the world's, and the runs that follow each other in it share them
def _arrange(device: torch.device, in_row: int) -> Mesh:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    assert ranks % in_row == 0, f"{in_row} ranks per slide of {ranks} ranks"
    device_mesh = init_device_mesh(device.type, (ranks // in_row, in_row), mesh_dim_names=("slides", "tiles"))
    row = None if in_row == ranks else device_mesh.get_group("tiles")
    return Mesh(RankGroup(rank, ranks), TileGroup(rank % in_row, in_row, row), device_mesh, device)


def start_world(device: torch.device) -> None:
    """Meet the other ranks that the launcher started (or be the only one); who has met stays so, for the next run.

    Raises:
        UserError: they cannot meet, for example because the port is taken.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _check_own_address()
    # Tensors on a GPU travel by NCCL; Python objects, and everything on a CPU machine, by gloo.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the ranks cannot meet at {where}: {error}. Where another run has the port, choose one with "
            "deepspeed --master_port, or torchrun --master-port"
        ) from None


def _check_own_address() -> None:
    """Refuse a machine whose name stands for an address that only itself can reach: gloo would listen at that one."""
    if local_ranks() == int(os.environ["WORLD_SIZE"]) or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name = socket.gethostname()
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(name, None)}
    except socket.gaierror:
        addresses = set()
    if all(ipaddress.ip_address(address).is_loopback for address in addresses):
        raise UserError(
            f"this machine's name, {name}, stands for {', '.join(sorted(addresses)) or 'no address'}, where the other "
            "machines cannot reach it: correct /etc/hosts, or set GLOO_SOCKET_IFNAME to its network interface on every "
            "machine (docs/several_machines.md)"
        )


def stop_world() -> None:
    """Leave the other ranks in good order."""
    if dist.is_initialized():
        _arrange.cache_clear()
        dist.destroy_process_group()
