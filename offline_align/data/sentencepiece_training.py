"""Train SentencePiece tokenizers: BPE with byte fallback, so that any text can be encoded."""

import io
import re
import string
from collections.abc import Iterable, Iterator
from itertools import chain

import sentencepiece

from offline_align.errors import ConfigError, DataError

UNKNOWN_ID, BOS_ID, EOS_ID, PAD_ID = range(4)
LONGEST_LINE_CHARACTERS = 2000
NUM_THREADS = 2
# These are always pieces, so that numbers and punctuation of templates and conditions never become bytes.
REQUIRED_CHARACTERS = string.ascii_letters + string.digits + string.punctuation

_VOCABULARY_LIMIT = re.compile(r"<= ?(\d+)")


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """Return a serialised SentencePiece model with `vocab_size` entries; training is deterministic.

    Text is not normalised and gets no added spaces. Every digit is a separate piece, and characters
    outside the vocabulary become bytes. Ids: unknown 0, begin 1, end 2, padding 3. Raises
    ConfigError, naming `tokenizer.vocab_size`, if the texts do not allow that many entries, and
    DataError if there is no text.
    """
    lines = _lines(texts)
    first = next(lines, None)
    if first is None:
        raise DataError("tokenizer.train: no text to train on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain([first], lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            required_chars=REQUIRED_CHARACTERS,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=8 * LONGEST_LINE_CHARACTERS,
            unk_id=UNKNOWN_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            num_threads=NUM_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(_advice(vocab_size, str(error))) from error
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Yield the text in pieces without line breaks, short enough that SentencePiece does not skip them."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), LONGEST_LINE_CHARACTERS):
                yield line[start : start + LONGEST_LINE_CHARACTERS]


def _advice(vocab_size: int, message: str) -> str:
    limit = _VOCABULARY_LIMIT.search(message)
    if limit:
        return f"tokenizer.vocab_size={vocab_size}: too many for so little text; set it to {limit[1]} or less"
    return f"tokenizer.vocab_size={vocab_size}: {' '.join(message.split())}; try a larger vocabulary"
