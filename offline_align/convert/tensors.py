"""Join and split tensors between Hugging Face's layout and ours, whole or for one tensor parallel rank."""

import torch
from torch import Tensor

from offline_align.convert.names import Join


def join(how: Join, parts: list[Tensor], groups: int) -> Tensor:
    """Return our tensor, joined from the Hugging Face `parts`, which have `groups` query groups.

    If the parts are the slices of one tensor parallel rank, the result is the shard of that rank.
    """
    if how is Join.query_groups:
        tail = parts[0].shape[1:]
        return torch.cat([part.reshape(groups, -1, *tail) for part in parts], dim=1).reshape(-1, *tail)
    if how is Join.stack:
        return torch.cat(parts)
    return parts[0]


def split(how: Join, tensor: Tensor, groups: int, channels: int, vocab_size: int) -> list[Tensor]:
    """Return the Hugging Face parts of our whole tensor, without padding rows; the inverse of `join`."""
    if how is Join.query_groups:
        tail = tensor.shape[1:]
        grouped = tensor.reshape(groups, -1, *tail)
        widths = [grouped.shape[1] - 2 * channels, channels, channels]
        return [part.reshape(-1, *tail) for part in torch.split(grouped, widths, dim=1)]
    if how is Join.stack:
        return list(tensor.chunk(2))
    if how is Join.vocabulary:
        return [tensor[:vocab_size]]
    return [tensor]


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return `tensor` padded with zero rows to `rows` rows."""
    if tensor.shape[0] == rows:
        return tensor
    padding = tensor.new_zeros((rows - tensor.shape[0], *tensor.shape[1:]))
    return torch.cat([tensor, padding])
