"""The stack of layers, of which the last one computes only the positions that the head reads.

Shape legend: T tokens of the bin, N positions that the head reads, C hidden width.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from offline_align.model.attention import Segments

# Matrix products in fp8 need a multiple of 16 rows. Padding also avoids kernels on empty inputs if the
# head reads nothing of a bin.
_MULTIPLE = 16


def read_places(index: Tensor, sequence_parallel: bool) -> Tensor | None:
    """Return the positions that the last layer's MLP computes: `index` [N], padded to a multiple of 16.

    Returns None under sequence parallelism, for all positions: each rank holds a slice of the sequence,
    and a position of `index` can be on any rank.
    """
    if sequence_parallel:
        return None
    missing = -index.numel() % _MULTIPLE if index.numel() else _MULTIPLE
    return torch.cat((index, index.new_zeros(missing)))


class LastLayer(TransformerLayer):  # type: ignore[misc]
    """A layer whose MLP, two thirds or more of its parameters, computes only the positions that the head reads.

    Other positions only contribute keys and values to the last layer, because no layer follows.
    """

    def _forward_mlp(
        self, hidden_states: Tensor, *arguments: Any, packed_seq_params: PackedSeqParams | None = None, **named: Any
    ) -> Any:
        """Return [N, 1, C] from [T, 1, C]."""
        assert isinstance(packed_seq_params, Segments), "every batch of this project is packed"
        if packed_seq_params.read is not None:
            hidden_states = hidden_states.index_select(0, packed_seq_params.read)
        return super()._forward_mlp(hidden_states, *arguments, packed_seq_params=packed_seq_params, **named)


def layer_specs(submodules: TransformerLayerSubmodules, count: int) -> list[ModuleSpec]:
    """Return the specifications of `count` layers with the same submodules."""
    return [
        ModuleSpec(module=LastLayer if number == count - 1 else TransformerLayer, submodules=submodules)
        for number in range(count)
    ]
