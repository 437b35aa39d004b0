"""Reproduce offline_align/data/assets/demo.model byte for byte: `python scripts/make_demo_tokenizer.py`."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from offline_align.data.demo import demo_samples, demo_tokenizer_path
from offline_align.data.sentencepiece_training import train_sentencepiece

SEED = 1234
NUM_ROWS = 6000
VOCAB_SIZE = 640
# Words of templates and conditions. `corpus` repeats them often enough to become pieces.
TEMPLATE_WORDS = ("User:", "Assistant: ", "System:", "<rm_score>")


def corpus() -> Iterator[str]:
    """Yield the texts that the demo tokenizer is trained on."""
    for row in demo_samples(NUM_ROWS, SEED, held_out=0):
        yield row["prompt"]
        yield row["response"]
        yield from TEMPLATE_WORDS


def main() -> None:
    """Write the model to the given path, by default to its place in the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, default=demo_tokenizer_path())
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(train_sentencepiece(corpus(), VOCAB_SIZE))


if __name__ == "__main__":
    main()
