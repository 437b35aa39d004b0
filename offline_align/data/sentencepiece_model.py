"""Read SentencePiece model files, and make variants of a model that encode text differently."""

import re
from typing import Any

MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
"""Pattern of user-defined SentencePiece symbols that are treated as control tokens."""


def parsed(model: bytes) -> Any:
    """Return the parsed protobuf of a model; raises ValueError if it is not a SentencePiece model."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise ValueError("is not a SentencePiece model") from error
    if not proto.pieces:
        raise ValueError("is not a SentencePiece model: it has no pieces")
    return proto


def processor(model: bytes) -> Any:
    """Return the SentencePiece processor of a model."""
    from sentencepiece import SentencePieceProcessor

    loaded = SentencePieceProcessor()
    loaded.LoadFromSerializedProto(model)
    return loaded


def without_dummy_prefix(model: bytes) -> bytes:
    """Return the model with the dummy prefix disabled."""
    proto = parsed(model)
    proto.normalizer_spec.add_dummy_prefix = False
    changed: bytes = proto.SerializeToString()
    return changed


def without_markers(model: bytes) -> tuple[bytes, tuple[str, ...]]:
    """Return the model with its marker-shaped user-defined symbols disabled, and these symbols."""
    from sentencepiece import sentencepiece_model_pb2

    proto = parsed(model)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    markers = [p for p in proto.pieces if p.type == kinds.USER_DEFINED and MARKER.fullmatch(p.piece)]
    for piece in markers:
        piece.type = kinds.UNUSED
    return proto.SerializeToString(), tuple(piece.piece for piece in markers)
