"""SentencePiece's own files: reading them, and variants of a model that encode text otherwise."""

import re
from typing import Any

MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
"""Shape of a user-defined SentencePiece symbol that is taken for a control token."""


def parsed(model: bytes) -> Any:
    """Return the contents of a model; ValueError where it is none."""
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
    """Return what encodes and decodes with a model."""
    from sentencepiece import SentencePieceProcessor

    loaded = SentencePieceProcessor()
    loaded.LoadFromSerializedProto(model)
    return loaded


def without_dummy_prefix(model: bytes) -> bytes:
    """Return the model without the space that it puts in front of a text."""
    proto = parsed(model)
    proto.normalizer_spec.add_dummy_prefix = False
    changed: bytes = proto.SerializeToString()
    return changed


def without_markers(model: bytes) -> tuple[bytes, tuple[str, ...]]:
    """Return the model with its marker-shaped user-defined symbols unused, and these symbols."""
    from sentencepiece import sentencepiece_model_pb2

    proto = parsed(model)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    markers = [p for p in proto.pieces if p.type == kinds.USER_DEFINED and MARKER.fullmatch(p.piece)]
    for piece in markers:
        piece.type = kinds.UNUSED
    return proto.SerializeToString(), tuple(piece.piece for piece in markers)
