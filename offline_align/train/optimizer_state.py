"""The state of the optimizer in checkpoints: every rank writes and reads the part that it holds, and sends nothing.

The distributed optimizer gives each data parallel rank a range of the elements of a flattened parameter: main weight
and two moments. megatron's own form that any layout can load (`fully_reshardable`) gathers the state of all on each of
them, 12 bytes a parameter, so that a node of eight ranks holds it eight times while it saves. Here a range is cut where
rows end, into boxes of the tensor, which torch's checkpoints are made of. The files hold the same tensors under the
same names, with the distributed optimizer or without it, and megatron's form loads them.
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
_PARTS = "param_state"
_KINDS = ("param", "exp_avg", "exp_avg_sq")

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes along each axis."""


def to_save(optimizer: MegatronOptimizer, weights: dict[str, Any]) -> dict[str, Any]:
    """Return megatron's description of the state that this rank holds, `weights` being that of the weights.

    Its tensors are those in use, or copies on the CPU of what this rank alone holds on a GPU.
    """
    held = _held(optimizer)
    parts = _parts(held, weights)
    for parameter, kinds in zip(held.ranges(), parts.values(), strict=True):
        tensors = held.tensors(parameter)
        for kind, boxes in kinds.items():
            pieces = torch.split(tensors[kind].detach().flatten(), [math.prod(box.local_shape) for box in boxes])
            for box, piece in zip(boxes, pieces, strict=True):
                # One by one: boxes of one copy would be copied again for the file. Others may write what all have.
                box.data = piece.view(box.local_shape).cpu() if held.alone else piece.view(box.local_shape)
    form = {"param_state_sharding_type": FORM["distrib_optim_sharding_type"]}
    return held.groups() | form | {_PARTS: parts}


def to_load(optimizer: MegatronOptimizer, weights: dict[str, Any]) -> dict[str, Any]:
    """Return megatron's description of the state that this rank asks for, `weights` being that of the weights."""
    return {_PARTS: _parts(_held(optimizer), weights)}


@torch.no_grad()
def take(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Give the optimizer what was loaded for `to_load`."""
    held = _held(optimizer)
    parts = loaded.pop(_PARTS)
    held.take_groups(loaded)
    for parameter, kinds in zip(held.ranges(), parts.values(), strict=True):
        held.take(parameter, {kind: torch.cat([piece.flatten() for piece in kinds[kind]]) for kind in kinds})


@dataclass(frozen=True)
class _Divided:
    """What this rank holds of an optimizer that is divided among data parallel ranks."""

    optimizer: DistributedOptimizer
    alone: ClassVar[bool] = True
    """Whether no other data parallel rank holds the same."""

    def ranges(self) -> dict[nn.Parameter, tuple[int, int]]:
        """Return the parameters that this rank has elements of, with the first of them and the end."""
        return {
            parameter: (ranges["param"].start, ranges["param"].end)
            for buckets_of_dtypes in self.optimizer.gbuf_ranges
            for buckets in buckets_of_dtypes.values()
            for bucket in buckets
            for parameter, ranges in bucket["param_map"].items()
        }

    def tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return main weight and moments, as far as they are here, in fp32; a lean optimizer makes them for this."""
        found: dict[str, Tensor] = self.optimizer._get_main_param_and_optimizer_states(parameter)
        return found

    def take(self, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        """Set what `tensors` gives."""
        self.optimizer._set_main_param_and_optimizer_states(parameter, tensors)

    def groups(self) -> dict[str, Any]:
        """Return what is known of groups of parameters, such as the number of updates."""
        found: dict[str, Any] = self.optimizer.state_dict()
        return found

    def take_groups(self, found: dict[str, Any]) -> None:
        """Set what `groups` gives."""
        self.optimizer.load_state_dict(found)


@dataclass
class _Whole:
    """The same of an optimizer that every data parallel rank has whole."""

    optimizer: Any
    alone: ClassVar[bool] = False

    def ranges(self) -> dict[nn.Parameter, tuple[int, int]]:
        return {parameter: (0, parameter.numel()) for parameter in self.main_weights}

    def tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        main = self.main_weights[parameter]
        return {"param": main, **self.optimizer.optimizer.state[main]}

    def take(self, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        for kind, own in self.tensors(parameter).items():
            own.copy_(tensors[kind].view_as(own))

    def groups(self) -> dict[str, Any]:
        groups = self.optimizer.param_groups
        return {"optimizer": {"param_groups": [{k: v for k, v in g.items() if k != "params"} for g in groups]}}

    def take_groups(self, found: dict[str, Any]) -> None:
        own = self.optimizer.param_groups
        theirs = [group | {"params": None} for group in found["optimizer"]["param_groups"]]
        for group, other in zip(own, self.optimizer._filter_and_reorder_param_groups(own, theirs), strict=True):
            group.update(other | {"params": group["params"]})

    @cached_property
    def main_weights(self) -> dict[nn.Parameter, Tensor]:
        """Return the weight in fp32 of each parameter: of an fp32 one the parameter itself."""
        if isinstance(self.optimizer, FP32Optimizer):
            return {parameter: parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        halves = chain.from_iterable(self.optimizer.float16_groups)
        mains = chain.from_iterable(self.optimizer.fp32_from_float16_groups)
        wholes = chain.from_iterable(self.optimizer.fp32_from_fp32_groups)
        return dict(zip(halves, mains, strict=True)) | {parameter: parameter for parameter in wholes}


def _held(optimizer: MegatronOptimizer) -> _Divided | _Whole:
    (only,) = optimizer.chained_optimizers
    if not only.optimizer.state:
        # Before the first update there are no moments, and where that one was skipped a run may be saved without.
        only.init_state_fn(only.optimizer, only.config)
    return _Divided(only) if isinstance(only, DistributedOptimizer) else _Whole(only)


def _parts(held: _Divided | _Whole, weights: dict[str, Any]) -> dict[int, dict[str, list[ShardedTensor]]]:
    """Return the boxes, without data, that make up each range in the order of its elements, by kind of tensor."""
    described = {weight.data: weight for weight in nested_values(weights)}
    return {
        number: {
            kind: [
                # Weights count their copies by data parallel rank too.
                replace(box, replica_id=(*box.replica_id[:2], 0)) if held.alone else box
                for tensor, first in _pieces(described[parameter], f"optimizer.state.{kind}")
                for box in _boxes(tensor, start - first, stop - first)
            ]
            for kind in _KINDS
        }
        for number, (parameter, (start, stop)) in enumerate(held.ranges().items())
    }


def _pieces(weight: ShardedTensor | ShardedTensorFactory, prefix: str) -> list[tuple[ShardedTensor, int]]:
    """Return fp32 tensors like what a weight is divided into, such as gate and up, and where each begins in it."""
    # Of no device: a view of it tells its place, and has no data.
    whole = torch.empty(weight.data.shape, device="meta")
    named = {"key": f"{prefix}.{weight.key}", "data": whole}
    if isinstance(weight, ShardedTensorFactory):
        tensors = list(nested_values(replace(weight, **named).build()))
    else:
        tensors = [replace(weight, **named, dtype=whole.dtype)]
    return [(tensor, tensor.data.storage_offset()) for tensor in tensors]


def _boxes(tensor: ShardedTensor, start: int, stop: int) -> list[ShardedTensor]:
    """Return the boxes of those elements of a flattened tensor that lie from `start` to `stop`."""
    shape = (1,) * tensor.prepend_axis_num + tensor.local_shape
    found = []
    for offsets, sizes in cut(max(start, 0), min(stop, math.prod(shape)), shape):
        place = tuple(a + b for a, b in zip(tensor.global_offset, offsets, strict=True))
        no_grid = {"axis_fragmentations": None, "prepend_axis_num": 0, "data": None}
        found.append(replace(tensor, local_shape=sizes, global_offset=place, **no_grid))
    return found


def cut(start: int, stop: int, shape: tuple[int, ...]) -> list[Box]:
    """Cut elements `start` to `stop` of a flattened tensor of `shape` into boxes, in their order.

    In two dimensions these are the end of a row, whole rows, and the beginning of a row.
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
