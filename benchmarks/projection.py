"""Project the hours of the paper's Table 3 (8 B, 100,000 samples) from a measured or assumed MFU."""

from offline_align.estimate.hardware import NODES
from offline_align.estimate.sizes import ModelSizes

# A100 hours from Table 3 of the paper.
PUBLISHED_A100_HOURS = {"FA": 27.5, "RWR": 64.0, "CA": 65.0}
SAMPLES = 100_000
# If the distribution of the rewards is symmetric, half of the normalised rewards are above the threshold 0.
FA_KEEPS = 0.5
LLAMA_8B = ModelSizes(4096, 128, 4096, 1024, 14336, 32, 128256, tied=False)


def hours(gpu: str, mean_tokens: int, train_share: float, label_share: float) -> dict[str, float]:
    """Return the GPU hours of labelling all samples and of one epoch of each method, for given MFUs."""
    tokens, squared = SAMPLES * mean_tokens, SAMPLES * mean_tokens**2
    peak = NODES[gpu].peak_flops * 3600
    train = LLAMA_8B.train_flops(tokens, squared, tokens, tokens) / (train_share * peak)
    label = LLAMA_8B.train_flops(tokens, squared, 0, 0) / 3 / (label_share * peak)
    return {"FA": label + FA_KEEPS * train, "RWR": label + train, "CA": label + train}


def table_3_lines(measured: tuple[float, float] | None) -> list[str]:
    """Return a Markdown table of published and projected hours, or nothing without a measurement."""
    if measured is None:
        return ["Hours of the paper's Table 3: no projection without a GPU's peak."]
    train, label = measured
    found = {mean: hours("h100_80gb", mean, train, label) for mean in (300, 500, 1000)}
    lines = [
        f"\nTable 3 of the paper (8 B, 100,000 samples): labelling at {label:.0%} MFU, one epoch at {train:.0%}\n",
        "| method | paper, A100 hours | H100 hours at 300 tokens a row | 500 | 1000 |",
        "|---|---|---|---|---|",
    ]
    for method, published in PUBLISHED_A100_HOURS.items():
        lines.append(f"| {method} | {published} | " + " | ".join(f"{found[m][method]:.2f}" for m in found) + " |")
    return lines
