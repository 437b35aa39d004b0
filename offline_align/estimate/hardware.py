"""Published rates of accelerators, for the reported `mfu` and for the estimates of `plan`."""

from dataclasses import dataclass

# Dense bf16 matrix products, FLOP/s, from NVIDIA's data sheets (without sparsity).
_PEAK_BF16 = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
}


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak of the named device in FLOP/s, or None if it is not known."""
    return next((peak for name, peak in _PEAK_BF16.items() if name in device_name), None)


@dataclass(frozen=True)
class Node:
    """A DGX node: its GPUs, links and network. Rates are for one GPU unless noted."""

    gpu: str
    gpus: int
    peak_flops: float
    """Dense bf16, FLOP/s."""
    memory_bytes: float
    memory_bandwidth: float
    """Bytes a second."""
    link_bandwidth: float
    """NVLink, bytes a second in one direction."""
    network_bandwidth: float
    """All network adapters of the node together, bytes a second in one direction."""


# From NVIDIA's data sheets, which state NVLink for both directions together. A DGX A100 has eight
# network adapters of 200 Gb/s for computing, DGX H100 and H200 have eight of 400 Gb/s.
NODES = {
    "a100_40gb": Node("A100 40GB", 8, 312e12, 40e9, 1.555e12, 300e9, 200e9),
    "a100_80gb": Node("A100 80GB", 8, 312e12, 80e9, 2.039e12, 300e9, 200e9),
    "h100_80gb": Node("H100 80GB", 8, 989e12, 80e9, 3.35e12, 450e9, 400e9),
    "h200_141gb": Node("H200 141GB", 8, 989e12, 141e9, 4.8e12, 450e9, 400e9),
}
