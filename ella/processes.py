"""Several processes that share the data: sums and joins over all of them."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

NO_DATA = "The loader is empty in every process: expected at least one batch."


class Processes:
    """The processes whose loaders together yield the data, each its own part, which may be empty.

    All of them have to make the same calls in the same order. A process that dies ends the calls
    of the others with an error.

    Args:
        group: A group of `torch.distributed`; None takes that of all processes if
            `init_process_group` was called, and else this process alone.

    Raises:
        ValueError: If a group is given before `init_process_group`.
    """

    def __init__(self, group: Any = None) -> None:  # noqa: ANN401 - it differs with the backend
        self.group = group
        active = dist.is_available() and dist.is_initialized()
        if group is not None and not active:
            raise ValueError(
                f"`process_group` is {group!r}, but torch.distributed is not initialised. Call "
                f"init_process_group first, or leave it out to work in one process."
            )
        self.size = dist.get_world_size(group) if active else 1
        self.rank = dist.get_rank(group) if active else 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def each(self, value: T) -> list[T]:
        """What every process has, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def agreed(self, value: T | None) -> T:
        """What the first process has that has something.

        Raises:
            ValueError: If none has.
        """
        for each in self.each(value):
            if each is not None:
                return each
        raise ValueError(NO_DATA)

    def extent(self, count: int) -> tuple[int, int]:
        """Where this process's examples begin among those of all, and how many all are."""
        counts = self.each(count)
        return sum(counts[: self.rank]), sum(counts)

    def joined(self, tensor: Tensor | None, device: torch.device) -> Tensor:
        """Rows of all processes, in their order; None is none.

        Raises:
            ValueError: If no process has any.
        """
        if self.size == 1 and tensor is not None:
            return tensor
        about = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
        parts = []
        for rank, each in enumerate(self.each(about)):
            if each is not None:
                shape, dtype = each
                part = torch.empty(shape, dtype=dtype, device=device)
                if rank == self.rank and tensor is not None:
                    part.copy_(tensor.detach())
                source = rank if self.group is None else dist.get_global_rank(self.group, rank)
                dist.broadcast(part, source, group=self.group)
                parts.append(part)
        if not parts:
            raise ValueError(NO_DATA)
        return torch.cat(parts)
