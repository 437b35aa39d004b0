"""Check the weights that a trainer hands to an engine."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from offline_align.errors import AlignError


def checked(tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
    """Yield `tensors`, which must be those of `shapes`, each once and in any order; raises AlignError.

    A wrong tensor is found before it is used, a missing one after the last.
    """
    left = dict(shapes)
    for name, tensor in tensors:
        shape = left.pop(name, None)
        if shape is None:
            reason = "is given twice" if name in shapes else "is not part of the model"
            raise AlignError(f"weights for the engine: {name} {reason}")
        if list(tensor.shape) != list(shape):
            raise AlignError(f"weights for the engine: {name} has shape {list(tensor.shape)}, not {list(shape)}")
        yield name, tensor
    if left:
        some = ", ".join(sorted(left)[:3])
        raise AlignError(f"weights for the engine: {len(left)} of the model are missing, such as {some}")
