"""The layers of a model: the last one works only where it is read.

Shape legend: T tokens of the bin, N places that the head reads, C hidden width.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from offline_align.model.attention import Segments

# Rows of a product in fp8 come in sixteens; and no kernel has to do without rows where a bin has nothing to read.
_MULTIPLE = 16


def read_places(index: Tensor, sequence_parallel: bool) -> Tensor | None:
    """Return where the last layer's MLP is computed so that the head finds `index` [N] first: [N or a few more].

    None where the ranks hold slices of the sequence: a place that is read may be on any of them.
    """
    if sequence_parallel:
        return None
    missing = -index.numel() % _MULTIPLE if index.numel() else _MULTIPLE
    return torch.cat((index, index.new_zeros(missing)))


class LastLayer(TransformerLayer):  # type: ignore[misc]
    """A layer whose MLP, two thirds of its parameters or more, sees only the places that the head reads.

    Others need no more than keys and values in the last layer, for no layer looks back on what comes after.
    """

    def _forward_mlp(
        self, hidden_states: Tensor, *arguments: Any, packed_seq_params: PackedSeqParams | None = None, **named: Any
    ) -> Any:
        """Return [N, 1, C] from [T, 1, C]."""
        assert isinstance(packed_seq_params, Segments), "every batch of this project is packed"
        if packed_seq_params.read is not None:
            hidden_states = hidden_states.index_select(0, packed_seq_params.read)
        return super()._forward_mlp(hidden_states, *arguments, packed_seq_params=packed_seq_params, **named)


def stacked(submodules: TransformerLayerSubmodules, count: int) -> list[ModuleSpec]:
    """Return the specifications of `count` layers of the same parts."""
    return [
        ModuleSpec(module=LastLayer if number == count - 1 else TransformerLayer, submodules=submodules)
        for number in range(count)
    ]
