"""Optimizer state in checkpoints: every rank writes and reads its own part, without communication.

The distributed optimizer assigns each data parallel rank a range of the elements of a flattened
parameter, and with it that part of the main weight and the two moments. megatron's own format for
loading at any layout (`fully_reshardable`) gathers the whole state on every rank, 12 bytes per
parameter, so a node of eight ranks holds it eight times during a save.

Here a range is cut at the ends of rows into boxes (rectangular parts) of the unflattened tensor. Boxes
are what torch's distributed checkpoints consist of. The files contain the same tensors under the same
names, with or without the distributed optimizer, and megatron's `fully_reshardable` loads them.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from torch import Tensor, nn

FORM = {"distrib_optim_sharding_type": "fully_reshardable"}
_PARAM_STATE = "param_state"
_KINDS = ("param", "exp_avg", "exp_avg_sq")

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes along each axis."""


def to_save(optimizer: MegatronOptimizer, weights: dict[str, Any]) -> dict[str, Any]:
    """Return the sharded state dict of the optimizer state that this rank holds, with data.

    `weights` is the sharded state dict of the model. The tensors share memory with the optimizer,
    except that state of a distributed optimizer on a GPU is copied to the CPU.
    """
    state = _state_of(optimizer)
    parts = _sharded_state(state, weights)
    for parameter, kinds in zip(state.ranges(), parts.values(), strict=True):
        tensors = state.tensors(parameter)
        for kind, boxes in kinds.items():
            pieces = torch.split(tensors[kind].detach().flatten(), [math.prod(box.local_shape) for box in boxes])
            for box, piece in zip(boxes, pieces, strict=True):
                # Each piece is copied by itself: views of one copy would be copied again for the file.
                # Replicated state stays on the GPU, since another rank may be the one to write it.
                box.data = piece.view(box.local_shape).cpu() if state.is_exclusive else piece.view(box.local_shape)
    form = {"param_state_sharding_type": FORM["distrib_optim_sharding_type"]}
    return state.groups() | form | {_PARAM_STATE: parts}


def to_load(optimizer: MegatronOptimizer, weights: dict[str, Any]) -> dict[str, Any]:
    """Return the sharded state dict of the optimizer state that this rank needs, without data.

    `weights` is the sharded state dict of the model.
    """
    return {_PARAM_STATE: _sharded_state(_state_of(optimizer), weights)}


@torch.no_grad()
def load_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Set the optimizer state from `loaded`, which was read for the description of `to_load`."""
    state = _state_of(optimizer)
    parts = loaded.pop(_PARAM_STATE)
    state.set_groups(loaded)
    for parameter, kinds in zip(state.ranges(), parts.values(), strict=True):
        state.set_tensors(parameter, {kind: torch.cat([piece.flatten() for piece in kinds[kind]]) for kind in kinds})


@dataclass(frozen=True)
class _ShardedState:
    """This rank's part of an optimizer that is sharded over data parallel ranks."""

    optimizer: DistributedOptimizer
    is_exclusive: ClassVar[bool] = True
    """Whether no other data parallel rank holds the same elements."""

    def ranges(self) -> dict[nn.Parameter, tuple[int, int]]:
        """Return, for each parameter of which this rank has elements, the range [start, stop) of them."""
        return {
            parameter: (ranges["param"].start, ranges["param"].end)
            for buckets_of_dtypes in self.optimizer.gbuf_ranges
            for buckets in buckets_of_dtypes.values()
            for bucket in buckets
            for parameter, ranges in bucket["param_map"].items()
        }

    def tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return this rank's elements of the main weight and the moments, in fp32.

        A precision-aware optimizer, which stores less, converts them for this call.
        """
        found: dict[str, Tensor] = self.optimizer._get_main_param_and_optimizer_states(parameter)
        return found

    def set_tensors(self, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        """Set main weight and moments from what `tensors` returned."""
        self.optimizer._set_main_param_and_optimizer_states(parameter, tensors)

    def groups(self) -> dict[str, Any]:
        """Return the settings and counters of the parameter groups, such as the number of updates."""
        found: dict[str, Any] = self.optimizer.state_dict()
        return found

    def set_groups(self, found: dict[str, Any]) -> None:
        """Set the parameter groups from what `groups` returned."""
        self.optimizer.load_state_dict(found)


@dataclass
class _ReplicatedState:
    """The state of an optimizer that every data parallel rank holds in full; same methods as `_ShardedState`."""

    optimizer: Any
    is_exclusive: ClassVar[bool] = False

    def ranges(self) -> dict[nn.Parameter, tuple[int, int]]:
        return {parameter: (0, parameter.numel()) for parameter in self.main_weights}

    def tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        main = self.main_weights[parameter]
        return {"param": main, **self.optimizer.optimizer.state[main]}

    def set_tensors(self, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        for kind, own in self.tensors(parameter).items():
            own.copy_(tensors[kind].view_as(own))

    def groups(self) -> dict[str, Any]:
        groups = self.optimizer.param_groups
        return {"optimizer": {"param_groups": [{k: v for k, v in g.items() if k != "params"} for g in groups]}}

    def set_groups(self, found: dict[str, Any]) -> None:
        own = self.optimizer.param_groups
        theirs = [group | {"params": None} for group in found["optimizer"]["param_groups"]]
        for group, other in zip(own, self.optimizer._filter_and_reorder_param_groups(own, theirs), strict=True):
            group.update(other | {"params": group["params"]})

    @cached_property
    def main_weights(self) -> dict[nn.Parameter, Tensor]:
        """Return the fp32 main weight of each parameter; an fp32 parameter is its own main weight."""
        if isinstance(self.optimizer, FP32Optimizer):
            return {parameter: parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        halves = chain.from_iterable(self.optimizer.float16_groups)
        mains = chain.from_iterable(self.optimizer.fp32_from_float16_groups)
        wholes = chain.from_iterable(self.optimizer.fp32_from_fp32_groups)
        return dict(zip(halves, mains, strict=True)) | {parameter: parameter for parameter in wholes}


def _state_of(optimizer: MegatronOptimizer) -> _ShardedState | _ReplicatedState:
    (only,) = optimizer.chained_optimizers
    if not only.optimizer.state:
        # There are no moments before the first update. A run can be saved without one if its first
        # steps were skipped.
        only.init_state_fn(only.optimizer, only.config)
    return _ShardedState(only) if isinstance(only, DistributedOptimizer) else _ReplicatedState(only)


def _sharded_state(
    state: _ShardedState | _ReplicatedState, weights: dict[str, Any]
) -> dict[int, dict[str, list[ShardedTensor]]]:
    """Return the boxes, without data, of every parameter's range: by number of the parameter, then by kind.

    The boxes of a range are in the order of its elements.
    """
    weight_of = {weight.data: weight for weight in nested_values(weights)}
    parts: dict[int, dict[str, list[ShardedTensor]]] = {}
    for number, (parameter, (start, stop)) in enumerate(state.ranges().items()):
        boxes = {kind: _boxes_of_range(weight_of[parameter], kind, start, stop) for kind in _KINDS}
        if state.is_exclusive:
            boxes = {kind: _without_replicas(found) for kind, found in boxes.items()}
        parts[number] = boxes
    return parts


def _boxes_of_range(
    weight: ShardedTensor | ShardedTensorFactory, kind: str, start: int, stop: int
) -> list[ShardedTensor]:
    """Return the boxes of elements `start` to `stop` of a flattened weight, for one kind of state."""
    boxes = []
    for tensor, first in _tensors_of_weight(weight, f"optimizer.state.{kind}"):
        boxes += _boxes(tensor, start - first, stop - first)
    return boxes


def _without_replicas(boxes: list[ShardedTensor]) -> list[ShardedTensor]:
    """Return the boxes as the only copies among data parallel ranks; those of the weight are replicas."""
    return [replace(box, replica_id=(*box.replica_id[:2], 0)) for box in boxes]


def _tensors_of_weight(weight: ShardedTensor | ShardedTensorFactory, prefix: str) -> list[tuple[ShardedTensor, int]]:
    """Return fp32 descriptions of the tensors that a weight is saved as, and where each begins in it.

    Most weights are saved as one tensor; a fused projection is saved as several, such as gate and up.
    """
    # On the meta device, a view has a storage offset but no data.
    whole = torch.empty(weight.data.shape, device="meta")
    named = {"key": f"{prefix}.{weight.key}", "data": whole}
    if isinstance(weight, ShardedTensorFactory):
        tensors = list(nested_values(replace(weight, **named).build()))
    else:
        tensors = [replace(weight, **named, dtype=whole.dtype)]
    return [(tensor, tensor.data.storage_offset()) for tensor in tensors]


def _boxes(tensor: ShardedTensor, start: int, stop: int) -> list[ShardedTensor]:
    """Return the boxes of elements `start` to `stop` of a flattened tensor, as far as it has them."""
    shape = (1,) * tensor.prepend_axis_num + tensor.local_shape
    found = []
    for offsets, sizes in cut(max(start, 0), min(stop, math.prod(shape)), shape):
        place = tuple(a + b for a, b in zip(tensor.global_offset, offsets, strict=True))
        no_grid = {"axis_fragmentations": None, "prepend_axis_num": 0, "data": None}
        found.append(replace(tensor, local_shape=sizes, global_offset=place, **no_grid))
    return found


def cut(start: int, stop: int, shape: tuple[int, ...]) -> list[Box]:
    """Cut elements `start` to `stop` of a flattened tensor of `shape` into boxes, in the elements' order.

    In two dimensions, the boxes are the end of a row, whole rows, and the beginning of a row.
    """
    if len(shape) == 1:
        return [((start,), (stop - start,))] if start < stop else []
    row = math.prod(shape[1:])
    boxes: list[Box] = []
    while start < stop:
        number, inside = divmod(start, row)
        whole_rows = 0 if inside else (stop - start) // row
        if whole_rows:
            boxes.append(((number, *(0 for _ in shape[1:])), (whole_rows, *shape[1:])))
            start += whole_rows * row
        else:
            end = min(stop - number * row, row)
            boxes += [((number, *offsets), (1, *sizes)) for offsets, sizes in cut(inside, end, shape[1:])]
            start = number * row + end
    return boxes
