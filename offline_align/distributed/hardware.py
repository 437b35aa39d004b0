"""Peak rates of accelerators: what a measured rate is compared with."""

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
    """Return the dense bf16 peak of the named device in FLOP/s, or None where it is not known."""
    return next((peak for name, peak in _PEAK_BF16.items() if name in device_name), None)
