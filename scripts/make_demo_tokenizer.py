"""Reproduce offline_align/data/assets/demo.model byte for byte: `python scripts/make_demo_tokenizer.py`."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from offline_align.data.demo import demo_samples, demo_tokenizer_path
from offline_align.data.sentencepiece_training import train_sentencepiece

SEED = 1234
NUM_ROWS = 6000
VOCAB_SIZE = 1024
# Words of templates and conditions. `corpus` repeats them often enough to become pieces.
TEMPLATE_WORDS = ("User:", "Assistant: ", "System:", "<rm_score>")
# Common words beside those of the corpus, so that other English text is not spelt out in bytes.
COMMON_WORDS = (
    "about after again because before between could different each every first from good great how into just know "
    "large last little long look made make many might more most must name never new next number only other over part "
    "people place question right said same should small some something still such take than that their them then "
    "there these they thing think this those through time under until very want water what when where which while "
    "who why will with word work world write year young"
)


def corpus() -> Iterator[str]:
    """Yield the texts that the demo tokenizer is trained on."""
    for row in demo_samples(NUM_ROWS, SEED, held_out=0):
        yield row["prompt"]
        yield row["response"]
        yield from TEMPLATE_WORDS
    yield from [COMMON_WORDS] * 50


def main() -> None:
    """Write the model to the given path, by default to its place in the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, default=demo_tokenizer_path())
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(train_sentencepiece(corpus(), VOCAB_SIZE))


if __name__ == "__main__":
    main()
