"""What a strategy lets a rank hold of the model: arithmetic on its footprint."""

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from slidescale.engine.config import OptimConfig, OptimizerName, ParallelConfig
from slidescale.engine.memory.footprint import Footprint
from slidescale.engine.memory.needs import FP32
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.strategies.ddp import BUCKET_BYTES
from slidescale.engine.strategies.ds_config import offload_device

ShardingName = Literal["single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"]

# fp32 values of optimizer state for each that trains: two moments (Adam, LAMB), one (SGD with momentum).
MOMENTS = {"adamw": 2, "apex_adam": 2, "apex_lamb": 2, "sgd": 1}

# DeepSpeed's defaults (runtime/zero/config.py), in parameters: reduce_bucket_size, stage3_max_live_parameters.
REDUCE_BUCKET = 500_000_000
MAX_LIVE = 1_000_000_000

# Bytes of the two flat copies through which ddp's gradients travel.
DDP_BUCKETS = 2 * BUCKET_BYTES


@dataclass(frozen=True, kw_only=True)
class Holding:
    """Who holds what of the model: the settings that its memory follows from.

    Attributes:
        strategy: its name, with the stage of ZeRO.
        shards: ranks that the model is spread over.
        optimizer: whose state is held.
        offload_optimizer: optimizer state is in the host's memory.
        offload_parameters: parameters are in the host's memory.
        fsdp_hold: fsdp gathers all parameters once per step.
        reduce_bucket: ds.json's `reduce_bucket_size`, in parameters.
        max_live: ds.json's `stage3_max_live_parameters`.
    """

    strategy: ShardingName = "single"
    shards: int = 1
    optimizer: OptimizerName = "adamw"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    fsdp_hold: bool = False
    reduce_bucket: int = REDUCE_BUCKET
    max_live: int = MAX_LIVE

    @classmethod
    def of(
        cls, parallel: ParallelConfig, strategy: str, ds_config: dict[str, Any] | None, mesh: Mesh, optimizer: str
    ) -> "Holding":
        """As a run's settings say.

        Args:
            strategy: its name, as `Strategy.name` has it.
            ds_config: ds.json as completed, or None.
            optimizer: its name in lower case, the one in ds.json where that names one.
        """
        zero = (ds_config or {}).get("zero_optimization", {})
        return cls(
            strategy=cast(ShardingName, strategy),
            shards=mesh.tiles.size if parallel.fsdp_shard == "tiles" else mesh.world.size,
            # Other optimizers keep Adam's two moments too, or fewer.
            optimizer=cast(OptimizerName, optimizer if optimizer in MOMENTS else "adamw"),
            offload_optimizer=bool(offload_device(zero, "offload_optimizer")),
            offload_parameters=bool(offload_device(zero, "offload_param")) or parallel.fsdp_offload,
            fsdp_hold=parallel.fsdp_hold,
            reduce_bucket=int(zero.get("reduce_bucket_size", REDUCE_BUCKET)),
            max_live=int(zero.get("stage3_max_live_parameters", MAX_LIVE)),
        )


def optimizer_of(config: OptimConfig, ds_config: dict[str, Any] | None) -> str:
    """The name, in lower case, of the optimizer that ds.json names, or else the settings."""
    return str((ds_config or {}).get("optimizer", {}).get("type", config.optimizer)).lower()


@dataclass(frozen=True)
class ModelState:
    """Bytes a rank holds of the model, whatever K is.

    Attributes:
        parameters: the rank's own, and those of other ranks that are gathered at once.
        gradients: the rank's own sum over all chunks, whole, and its shard of the reduced ones where there is one.
        optimizer: moments, and the fp32 copy of the parameters' shard that ZeRO-1 and 2 keep.
        buffers: for communication, held all the time.
        update: what reduction and update need beyond these, when the step's activations are gone.
        host: held in the host's memory instead (offload), beside a GPU.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    update: int
    host: int = 0

    @property
    def base(self) -> int:
        """Bytes held throughout a step."""
        return self.parameters + self.gradients + self.optimizer + self.buffers


def model_state(footprint: Footprint, holding: Holding) -> ModelState:
    """What a rank holds of the model with fp32 weights.

    Under ZeRO-1 to 3 and FSDP2 every rank sums its gradients over the step's chunks as a whole, locally, and reduces
    once (DeepSpeed's `coalesce_grad_reduction`, FSDP2's `set_requires_gradient_sync`). ZeRO-1 and 2 clone the shard
    they update even if the model is fp32 already (DeepSpeed 0.19: `single_partition_of_fp32_groups` in
    `stage_1_and_2.py`); ZeRO-3 does so only to offload it (`fp32_partitioned_groups_flat` in `stage3.py`).
    """
    cuda = footprint.flavour == "cuda"
    weights, trained = FP32 * footprint.parameters, FP32 * footprint.trained
    ranks, shard = holding.shards, -(-trained // holding.shards)
    moments = MOMENTS[holding.optimizer]
    # PyTorch updates all tensors at once on a GPU, through temporaries of their size, and one by one on a CPU.
    temporary = 2 * trained if cuda else 2 * FP32 * footprint.largest
    bucket = FP32 * holding.reduce_bucket
    if not cuda:
        bucket = min(trained, bucket)  # it is touched as it fills
    match holding.strategy:
        case "single":
            return ModelState(weights, trained, moments * trained, 0, temporary)
        case "ddp":
            return ModelState(weights, trained, moments * trained, 0, max(DDP_BUCKETS, temporary))
        case "zero0":
            return ModelState(weights, trained, moments * trained, 0, max(min(bucket, trained), temporary))
        case "zero1" | "zero2":
            state = (1 + moments) * shard
            update = max(bucket + shard, 2 * shard + min(temporary, 2 * shard))
            if holding.offload_optimizer:
                # the reduced shard too, and a buffer through which updated weights come back
                return _offloaded(ModelState(weights, trained, 0, 0, bucket), host=state + 2 * shard, cuda=cuda)
            return ModelState(weights, trained, state, 0, update)
        case "zero3":
            own, gathered = -(-weights // ranks), min(weights, FP32 * holding.max_live)
            host = (2 + moments) * shard if holding.offload_optimizer else 0
            host += own if holding.offload_parameters else 0
            held = ModelState(
                gathered + (0 if holding.offload_parameters else own),
                trained + (0 if holding.offload_optimizer else shard),
                0 if holding.offload_optimizer else moments * shard,
                bucket,
                shard + min(temporary, 2 * shard),
            )
            return _offloaded(held, host=host, cuda=cuda)
        case "fsdp":
            own = -(-weights // ranks)
            # the block that computes, the next one on its way, and what lies outside of blocks
            block = FP32 * footprint.block
            gathered = weights if holding.fsdp_hold else min(weights, 2 * block + FP32 * footprint.outside)
            if holding.offload_parameters:
                held = ModelState(gathered, trained, 0, 0, block)
                return _offloaded(held, host=own + (1 + moments) * shard, cuda=cuda)
            return ModelState(own + gathered, trained + shard, moments * shard, 0, min(temporary, 2 * shard))


def _offloaded(state: ModelState, *, host: int, cuda: bool) -> ModelState:
    """On a machine without accelerator, the host's memory is the same memory."""
    return replace(state, host=host) if cuda else replace(state, optimizer=state.optimizer + host)
