"""Class centres split over the processes of a run: which rows each has, and what they exchange."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer

BLOCK = 2**24  # bytes of rows that travel at once on their way to a checkpoint


class Shard(NamedTuple):
    """The rows [start, end) of a table of C that one of W processes has.

    ``gather``, ``sum``, ``logsumexp`` and ``whole`` are collectives: all processes of
    torch.distributed's default group call them in the same order.
    """

    rank: int
    world_size: int
    num_classes: int  # C

    @property
    def start(self) -> int:
        return self.num_classes * self.rank // self.world_size

    @property
    def end(self) -> int:
        return self.num_classes * (self.rank + 1) // self.world_size

    def rows(self, labels: Tensor) -> Tensor:
        """Labels (N,) int64 as row numbers here, -1 where the row is another process's."""
        inside = (labels >= self.start) & (labels < self.end)
        return torch.where(inside, labels - self.start, -1)

    def own(self, gathered: Tensor) -> Tensor:
        """What this process gave to what :meth:`gather` returned: (W N, ...) -> (N, ...)."""
        return gathered.chunk(self.world_size)[self.rank]

    def part(self, table: Tensor) -> Tensor:
        """The rows of a table of C that are this process's: a copy, as the file that a checkpoint
        is mapped from may be replaced."""
        return table[self.start : self.end].clone()

    def gather(self, given: Tensor) -> Tensor:
        """(N, ...) of each process, one after the other: (W N, ...). N is the same everywhere."""
        return _AllGather.apply(given, self)

    def sum(self, given: Tensor) -> Tensor:
        """The sum of what each process gives, of one shape."""
        return _AllReduce.apply(given)

    def logsumexp(self, given: Tensor) -> Tensor:
        """log of the sum of exp of what each process gives, (N,); without a gradient."""
        highest = given.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        highest = torch.where(highest == -torch.inf, 0, highest)  # a difference of the two is NaN
        total = (given - highest).exp_()
        dist.all_reduce(total)
        return total.log_().add_(highest)

    def whole(self, rows: Tensor) -> Tensor:
        """All C rows of a table of which each process has its own, for a checkpoint.

        Args:
            rows: (end - start, ...) of any dtype.

        Returns:
            On rank 0 (C, ...) on the CPU, in a file without a name in the folder of temporary files
            (``TMPDIR``), which is mapped into memory and goes with the tensor. On the others a
            tensor of that shape on the meta device, without data.

        Raises:
            OSError: on every process, where rank 0 cannot make the file.
        """
        shape = (self.num_classes, *rows.shape[1:])
        table = torch.empty(shape, dtype=rows.dtype, device="meta")
        refusal: list[str] = [""]
        if self.rank == 0:
            try:
                table = _mapped(table)
            except Exception as error:  # the others would wait for ever
                refusal = [str(error)]
        dist.broadcast_object_list(refusal)
        if refusal[0]:
            raise OSError(
                f"rank 0 must have room for {table.nbytes:,} bytes of class centres in its folder "
                f"of temporary files, got {refusal[0]}: TMPDIR names another"
            )
        shards = [self._replace(rank=rank) for rank in range(self.world_size)]
        most = max(shard.end - shard.start for shard in shards)
        block = max(1, BLOCK // (self.world_size * table[:1].nbytes))
        for first in range(0, most, block):
            part = rows.new_zeros((min(block, most - first), *shape[1:]))
            own = rows.detach()[first : first + block]
            part[: len(own)] = own
            parts = [torch.empty_like(part) for _ in shards] if self.rank == 0 else None
            dist.gather(part, parts)
            for shard, got in zip(shards, parts or (), strict=False):
                start, end = shard.start + first, min(shard.start + first + len(got), shard.end)
                table[start:end] = got[: max(0, end - start)]
        return table

    def gather_states(self, optimizer: Optimizer, weight: Tensor) -> None:
        """From here on ``optimizer.state_dict()`` has its states of all C rows of ``weight``, and
        ``load_state_dict`` takes those of this process from such."""

        def changed(saved: Any, length: int, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            index = next(i for i, p in enumerate(params) if p is weight)
            states = dict(saved["state"])
            if index in states:  # else no step has been taken
                states[index] = {
                    key: change(value) if _length(value) == length else value
                    for key, value in states[index].items()
                }
            return {**saved, "state": states}

        def whole(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            return changed(saved, len(weight), self.whole)

        def own(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            return changed(saved, self.num_classes, self.part)

        optimizer.register_state_dict_post_hook(whole)
        optimizer.register_load_state_dict_pre_hook(own)


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, Tensor) and value.ndim else None


def _mapped(like: Tensor) -> Tensor:
    """A tensor of such a shape and dtype in a file that nothing else sees."""
    with tempfile.TemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, like.nbytes)  # else a full disk is a SIGBUS later
        else:
            file.truncate(like.nbytes)
        buffer = mmap.mmap(file.fileno(), like.nbytes)
    return torch.frombuffer(buffer, dtype=like.dtype).view(like.shape)


class _AllGather(Function):
    """(N, ...) of each process to (W N, ...); the gradients of all of them are summed up."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        gathered = given.new_empty((shard.world_size * len(given), *given.shape[1:]))
        dist.all_gather_single(gathered, given.contiguous())
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = torch.empty_like(ctx.shard.own(grad))
        dist.reduce_scatter_single(own, grad.contiguous())
        return own, None


class _AllReduce(Function):
    """The sum over processes; so is the gradient, as each of them has the sum."""

    @staticmethod
    def forward(ctx: Any, given: Tensor) -> Tensor:
        total = given.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total
