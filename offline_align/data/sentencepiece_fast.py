"""Convert a SentencePiece model to a `tokenizer.json` with the same ids, which `transformers` can load."""

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from offline_align.data.sentencepiece_model import MARKER

SPACE = "▁"
# Piece types and model types of SentencePiece's own format description.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_UNIGRAM, _BPE = 1, 2

# Texts on which both tokenizers must agree before the fast one is used.
SAMPLES = (
    "User:What is the capital of France?Assistant: ",
    "Assistant: <rm_score>5.0",
    "Assistant: <rm_score>-5.0The answer is 42.",
    " leading,  double   and trailing spaces ",
    "line one\nline two\n\n\tindented\r\nwindows",
    "def f(x: int) -> int:\n    return x ** 2  # twice",
    "1234567890 3.14159 1,000,000 $5 50%",
    "naïve café Ångström ﬁne ½ ①",
    "日本語とEnglishの混在。中文 한국어 العربية עברית हिन्दी",
    "👍🏽 👩‍👩‍👧 zero\u200bwidth nbsp\u00a0here e\u0301",
    "[INST] <b>bold</b> ▁ ## \\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!......",
    "",
)


def convert(path: Path) -> Tokenizer | None:
    """Return a fast tokenizer for the SentencePiece `.model` at `path`, or None if no faithful one exists.

    The result gives SentencePiece's ids on every text of `SAMPLES`. Unlike SentencePiece, it treats
    control symbols (such as end of sequence) that occur in a text as special tokens.
    """
    proto = _parsed(path.read_bytes())
    if not _convertible(proto):
        return None
    tokenizer = _build(proto)
    return tokenizer if first_difference(path, tokenizer) is None else None


def faithful(model: bytes, prefix: str | None) -> Tokenizer | None:
    """Return a fast tokenizer for a SentencePiece model as in `transformers`, or None as `convert` does.

    User-defined symbols become added tokens; those that look like markers are special. `prefix`
    says when a space is added to the start of a text ("always": also after added tokens; "first";
    "never"); None keeps the model's own rule.
    """
    proto = _parsed(model)
    if not _convertible(proto) or _first_difference(model, _build(proto)) is not None:
        return None
    symbols = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    tokenizer = _build(proto, symbols_apart=False)
    if prefix is not None:
        proto.normalizer_spec.add_dummy_prefix = False
        tokenizer.normalizer = _normalizer(proto.normalizer_spec)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prefix, split=False)
        proto.normalizer_spec.add_dummy_prefix = prefix != "never"
        tokenizer.decoder = _decoder(proto.normalizer_spec)
    for text in symbols:
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=bool(MARKER.fullmatch(text)))])
    return tokenizer


def first_difference(path: Path, tokenizer: Tokenizer) -> str | None:
    """Return the first of `SAMPLES` whose ids differ from SentencePiece's, or None."""
    return _first_difference(path.read_bytes(), tokenizer)


def _first_difference(model: bytes, tokenizer: Tokenizer) -> str | None:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    for text in SAMPLES:
        if tokenizer.encode(text, add_special_tokens=False).ids != processor.encode(text):
            return text
    return None


def _parsed(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    return proto


def _convertible(proto: Any) -> bool:
    spec = proto.trainer_spec
    return spec.model_type in (_UNIGRAM, _BPE) and not spec.treat_whitespace_as_suffix


def _build(proto: Any, symbols_apart: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(_unigram(proto) if proto.trainer_spec.model_type == _UNIGRAM else _bpe(proto))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = _decoder(proto.normalizer_spec)
    symbols = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    if symbols and symbols_apart:
        # Added tokens would be split off before the space is added to the start of the text.
        longest_first = "|".join(re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), "isolated")
    control = [piece.piece for piece in proto.pieces if piece.type == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    return tokenizer


def _unigram(proto: Any) -> models.Unigram:
    # SentencePiece never matches byte and control pieces in text; a very low score approximates that.
    never = min(piece.score for piece in proto.pieces if piece.type == _NORMAL) - 100.0
    vocab = [(piece.piece, _score(piece, never)) for piece in proto.pieces]
    spec = proto.trainer_spec
    return models.Unigram(vocab, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)


def _score(piece: Any, never: float) -> float:
    if piece.type == _USER_DEFINED:
        return 0.0
    return float(piece.score) if piece.type == _NORMAL else never


def _bpe(proto: Any) -> models.BPE:
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    spec = proto.trainer_spec
    return models.BPE(
        vocab,
        _merges(proto),
        unk_token=spec.unk_piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
        # A user-defined symbol is one piece, although no merges produce it.
        ignore_merges=True,
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Return every pair of pieces that forms a piece, best piece first, as SentencePiece merges them."""
    normal = {piece.piece for piece in proto.pieces if piece.type == _NORMAL}
    ranked = sorted(
        (piece for piece in proto.pieces if piece.type == _NORMAL),
        key=lambda piece: piece.score,
        reverse=True,
    )
    return [
        (text[:i], text[i:])
        for text in (piece.piece for piece in ranked)
        for i in range(1, len(text))
        if text[:i] in normal and text[i:] in normal
    ]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(spec: Any) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
