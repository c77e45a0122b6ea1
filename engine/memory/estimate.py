"""What a plan costs on a device, and the largest bag that it takes: arithmetic on a `Plan`."""

from slidescale.engine.memory.devices import Device
from slidescale.engine.memory.needs import Job
from slidescale.engine.memory.planner import Plan
from slidescale.engine.memory.policies import Policy

# Share of the data sheet's arithmetic, and of its memory bandwidth, that a step is assumed to reach.
UTILISATION = 0.4
BANDWIDTH_UTILISATION = 0.7


def largest_k(job: Job, *, room: int, policy: Policy, chunk: int) -> int:
    """The most tiles, over all ranks, of which a step fits into `room` bytes beyond the base; 0 if none."""
    ranks = job.footprint.ranks

    def fits(local: int) -> bool:
        return policy.need(job, local * ranks, chunk, room)[1].total <= room

    if not fits(1):
        return 0
    high = 2
    while fits(high):
        high *= 2
        if high > 1 << 40:
            raise ValueError(f"any number of tiles fits into {room} bytes: the footprint does not grow with them")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * ranks


def step_flops(plan: Plan) -> float:
    """FLOPs per rank and step: forward, backward, and what is encoded again."""
    footprint, local = plan.job.footprint, plan.job.local(plan.k)
    again = 1 - min(1.0, plan.stored * plan.chunk / local)
    # The whole aggregator trains: its backward is twice its forward.
    return local * ((1 + again) * footprint.flops + footprint.backward_flops) + 3 * footprint.aggregator_flops(plan.k)


def step_seconds(plan: Plan, device: Device, *, bf16: bool) -> float:
    """Least time of a step on a device: that of its arithmetic, memory traffic or transfers, whichever is longest.

    At UTILISATION of the device's arithmetic and BANDWIDTH_UTILISATION of its bandwidths. In memory each operator's
    result is written once and read once. What is offloaded goes to the host and comes back, one after the other.
    Reading slides and communication between ranks are not in it.
    """
    job = plan.job
    arithmetic = step_flops(plan) / (UTILISATION * (device.bf16 if bf16 else device.fp32))
    traffic = 2 * job.local(plan.k) * job.footprint.traffic / (BANDWIDTH_UTILISATION * device.bandwidth)
    moved = 2 * plan.need.away / (BANDWIDTH_UTILISATION * device.host)
    return max(arithmetic, traffic, moved)
