"""Accelerators that a plan can name, with the figures of their data sheets: dense (without sparsity), per device."""

from dataclasses import dataclass

from slidescale.engine.errors import ConfigError
from slidescale.engine.units import MIB

# PCIe x16, bytes/s in one direction.
PCIE_4 = 32e9
PCIE_5 = 64e9


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        memory: bytes, as its driver reports them (nvidia-smi, rocm-smi).
        bf16: FLOP/s of dense bf16 matrix products.
        fp32: FLOP/s of fp32 arithmetic, without TF32.
        bandwidth: of its memory, bytes/s.
        host: to the host's memory, bytes/s in one direction.
    """

    name: str
    memory: int
    bf16: float
    fp32: float
    bandwidth: float
    host: float


DEVICES = {
    device.name: device
    for device in (
        # NVIDIA A100 datasheet (2021), SXM: 312 TFLOP/s, 19.5 fp32, 1,555 and 2,039 GB/s, PCIe 4.0.
        Device("A100-40GB", 40_960 * MIB, 312e12, 19.5e12, 1555e9, PCIE_4),
        Device("A100-80GB", 81_920 * MIB, 312e12, 19.5e12, 2039e9, PCIE_4),
        # NVIDIA H100 datasheet (2023), SXM: 1,979 TFLOP/s with sparsity, 67 fp32, 80 GB, 3.35 TB/s, PCIe 5.0.
        Device("H100", 81_559 * MIB, 989e12, 67e12, 3350e9, PCIE_5),
        # NVIDIA H200 datasheet (2024), SXM: as H100 with 141 GB and 4.8 TB/s.
        Device("H200", 143_771 * MIB, 989e12, 67e12, 4800e9, PCIE_5),
        # NVIDIA HGX B200 datasheet (2024), an eighth: 4.5 PFLOP/s with sparsity, 75 fp32, 180 GB, 8 TB/s, PCIe 5.0.
        Device("B200", 183_359 * MIB, 2250e12, 75e12, 8000e9, PCIE_5),
        # NVIDIA L40S datasheet (2023): 362 TFLOP/s, 91.6 fp32, 48 GB, 864 GB/s, PCIe 4.0.
        Device("L40S", 46_068 * MIB, 362e12, 91.6e12, 864e9, PCIE_4),
        # NVIDIA Ada architecture whitepaper (2022), appendix A: 165.2 TFLOP/s (fp32 accumulate), 82.6 fp32, 24 GB,
        # 1,008 GB/s, PCIe 4.0.
        Device("RTX4090", 24_564 * MIB, 165.2e12, 82.6e12, 1008e9, PCIE_4),
        # AMD Instinct MI300X datasheet (2023): 1,307 TFLOP/s, 163.4 fp32, 192 GB, 5.3 TB/s, PCIe 5.0.
        Device("MI300X", 196_592 * MIB, 1307.4e12, 163.4e12, 5300e9, PCIE_5),
    )
}


def find_device(name: str) -> Device:
    """The device of that name, in any case and with or without hyphens and blanks.

    Raises:
        ConfigError: there is none; lists those there are.
    """

    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace(" ", "")

    for device in DEVICES.values():
        if plain(device.name) == plain(name):
            return device
    raise ConfigError(f"--device is {name!r}: must be one of {', '.join(DEVICES)}")
