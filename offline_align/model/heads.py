"""The heads of the transformer: token log-likelihoods of a policy, scores of a reward model or critic.

Each head reads only the positions that it needs: the vocabulary head the targets, the reward head the
last tokens, or as a critic the targets.
Shape legend: T tokens of the bin, N targets, S segments, C hidden width, V vocabulary rows of this rank.
"""

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import MegatronModule
from torch import Tensor, nn

from offline_align.data.batch import PackedBatch
from offline_align.model.attention import Segments, attention_dtype
from offline_align.model.context_sum import over_context_ranks
from offline_align.model.layers import read_places
from offline_align.model.rotary import PackedRotaryEmbedding
from offline_align.model.vocabulary import target_nll


class Policy(GPTModel):  # type: ignore[misc]
    """A GPT that returns the negative log-likelihood of every target token."""

    num_tokens: int
    """Size of the tokenizer's vocabulary, without padding rows."""

    temperature: float = 1.0
    """The logits are divided by this, for likelihoods at the temperature that answers were sampled with."""

    rotary: PackedRotaryEmbedding

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return `-log p(x_i | p, x_<i)` at `temperature` for each target of `batch`: [N] in fp32 (Eq. 1)."""
        nll: Tensor = super().forward(
            batch.tokens,
            batch.positions,
            None,
            packed_seq_params=_segments(self, batch, batch.target_index),
            output_processor=self._target_nll,
            output_processor_context=batch,
        )
        return nll

    def _target_nll(
        self, hidden_states: Tensor, output_weight: Tensor | None, context: PackedBatch, **_: Any
    ) -> Tensor:
        # Only targets are multiplied by the output weight; prompt tokens are not.
        hidden = _hidden_at(context.target_index, hidden_states, self.config.sequence_parallel)
        if self.temperature != 1.0:
            # The output layer is linear without a bias, so this divides the logits, but fewer numbers.
            hidden = hidden / self.temperature
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        weight = self._output_weight() if output_weight is None else output_weight
        group = parallel_state.get_tensor_model_parallel_group()
        return target_nll(hidden, weight, context.target_ids, group, self.num_tokens)

    def _output_weight(self) -> Tensor:
        """Return the output weight [V, C], complete even with `overlap_param_gather`."""
        # megatron waits for the gathered weights of a module, and starts the next gather, in a forward
        # pre-hook of that module. A call with an empty input triggers the hook and computes nothing.
        weight: Tensor = self.output_layer.weight
        self.output_layer(weight.new_empty(0, weight.size(1)))
        return weight

    def logits(self, batch: PackedBatch) -> Tensor:
        """Return this rank's logits [T, V] of every token, for comparisons with other implementations."""

        def project(hidden_states: Tensor, output_weight: Tensor | None, **_: Any) -> Tensor:
            hidden = _whole_sequence(hidden_states, self.config.sequence_parallel)
            out: Tensor = self.output_layer(hidden, weight=output_weight)[0]
            return out[:, 0]

        found: Tensor = super().forward(
            batch.tokens,
            batch.positions,
            None,
            packed_seq_params=_segments(self, batch, None),
            output_processor=project,
        )
        return found


class RewardHead(nn.Module):
    """A linear layer from hidden states to one number, in fp32 at every precision of the model."""

    def __init__(self, hidden_size: int, std: float, device: torch.device) -> None:
        super().__init__()
        # On the CPU, all tensor parallel ranks have the same generator state.
        weight = torch.empty(1, hidden_size, dtype=torch.float32).normal_(0.0, std)
        self.weight = nn.Parameter(weight.to(device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [S] scores of hidden states [S, C]."""
        return nn.functional.linear(hidden.float(), self.weight)[:, 0]


class RewardModel(GPTModel):  # type: ignore[misc]
    """A GPT whose output layer is replaced by a scalar head (paper, step 2).

    With `reads_targets` it is a critic: it reads the same head before each target. So the weights of a
    reward model are those of a critic, and one module can be both in turn.
    """

    reads_targets: bool = False
    """Whether to score each prefix that ends before a target, instead of whole segments."""

    rotary: PackedRotaryEmbedding

    def replace_output_layer(self, head: RewardHead) -> None:
        """Replace the vocabulary projection by `head`."""
        self.output_layer = None
        self.share_embeddings_and_output_weights = False
        self.reward_head = head

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return megatron's sharded state dict, without GPTModel's rules for the output layer, which is gone."""
        shards: dict[str, Any] = MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        return shards

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return the score of each segment of `batch`, read at its last token: [S] in fp32.

        With `reads_targets`, return the value before each target of this rank is known: [N] in fp32.
        """
        scores: Tensor = super().forward(
            batch.tokens,
            batch.positions,
            None,
            packed_seq_params=_segments(self, batch, self._index(batch)),
            output_processor=self._scores,
            output_processor_context=batch,
        )
        return scores

    def _index(self, batch: PackedBatch) -> Tensor:
        """Return the positions that the head reads."""
        return batch.target_index if self.reads_targets else batch.last_index

    def _scores(self, hidden_states: Tensor, context: PackedBatch, **_: Any) -> Tensor:
        hidden = _hidden_at(self._index(context), hidden_states, self.config.sequence_parallel)
        scores: Tensor = self.reward_head(hidden)
        if self.reads_targets or context.last_is_here is None:
            return scores
        return over_context_ranks(torch.where(context.last_is_here, scores, 0.0))


def _segments(model: "Policy | RewardModel", batch: PackedBatch, read: Tensor | None) -> Segments:
    """Return the segments of `batch`; the head reads the positions `read`, or all if it is None."""
    places = None if read is None else read_places(read, model.config.sequence_parallel)
    positions = batch.positions[0]
    angles = model.rotary(positions, attention_dtype(model.config.params_dtype, positions.device))
    return Segments.of(batch, angles, places)


def _hidden_at(index: Tensor, hidden: Tensor, sequence_parallel: bool) -> Tensor:
    """Return the hidden states [N, C] at the positions `index`.

    Without sequence parallelism, the last layer has computed only these positions. Under sequence
    parallelism it has computed all, and they are gathered here.
    """
    if not sequence_parallel:
        return hidden[: index.numel(), 0]
    return _whole_sequence(hidden, sequence_parallel).index_select(0, index)[:, 0]


def _whole_sequence(hidden: Tensor, sequence_parallel: bool) -> Tensor:
    """Return the hidden states [T, 1, C] of the whole bin, gathered under sequence parallelism.

    The backward pass splits the gradient and does not sum it over ranks: the vocabulary head has
    already summed the parts of the ranks, and the reward head computes the full gradient on every rank.
    """
    if not sequence_parallel:
        return hidden
    gathered: Tensor = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return gathered
