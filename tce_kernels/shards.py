"""Rows whose classes are spread over the ranks of a process group: where they lie, agreement, what travels.

Each rank finds out a few numbers about its part of a row (`stats`), every rank gathers those of all ranks and combines
them in the same order, so that losses and masks are the same bits everywhere: ranks are one more way to split a row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .options import IGNORED


def torch_distributed():
    """torch.distributed, which is slow to import and not in every build."""
    import torch.distributed

    return torch.distributed


def resolved(group_name: str):
    """The group of a name, as which it goes through operators."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(group_name)


def all_gather(x: Tensor, group, async_op: bool = False):
    """x [...] of all ranks: [p, ...], or that and the work to wait for."""
    dist = torch_distributed()
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    work = None
    if x.numel():  # of all ranks or of none
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
        work = gather(out.view(-1), x.contiguous().view(-1), group=group, async_op=async_op)
    return (out, work) if async_op else out


class Shards:
    """The classes of each rank of a group, and the rows where those are spread too.

    sizes [2, p]: numbers of classes and of rows. On the CPU they are known to the host; elsewhere they stay tensors.
    """

    def __init__(self, group_name: str, sizes: Tensor):
        self.group = resolved(group_name)
        dist = torch_distributed()
        self.rank, self.n_ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        classes = sizes[0]
        self.start, self.n_classes = classes[: self.rank].sum(), classes.sum()
        if sizes.device.type == "cpu":
            self.start, self.n_classes = int(self.start), int(self.n_classes)
            self.most_classes = int(classes.max())

    def local(self, target: Tensor, ignore_index: int) -> Tensor:
        """Targets counted from this rank's first class; IGNORED for ignored rows."""
        return torch.where(target == ignore_index, IGNORED, target - self.start)

    def gather(self, x: Tensor) -> Tensor:
        return all_gather(x, self.group)

    def gather_later(self, x: Tensor) -> Callable[[], Tensor]:
        """Start to gather; what is returned waits for it."""
        gathered, work = all_gather(x, self.group, async_op=True)

        def wait():
            if work is not None:
                work.wait()
            return gathered

        return wait

    def add_later(self, x: Tensor) -> Callable[[], Tensor]:
        """Start to sum up x over the ranks, in place; what is returned waits for it."""
        work = torch_distributed().all_reduce(x, group=self.group, async_op=True) if x.numel() else None

        def wait():
            if work is not None:
                work.wait()
            return x

        return wait


class SpreadRows:
    """The selected ones of rows that are spread over ranks, one rank's after the other's: what leaves a rank.

    selected: bool [n], of this rank's rows.
    """

    def __init__(self, shards: Shards, selected: Tensor):
        self.shards, self.n_rows = shards, len(selected)
        self.own = selected.nonzero().squeeze(1)
        self.counts = shards.gather(selected.sum()).tolist()
        start = sum(self.counts[: shards.rank])
        self.own_part = slice(start, start + len(self.own))

    def gather(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Own rows x [n, ...] -> the selected ones of all ranks, [K, ...]. Parts are padded to the longest."""
        padded = x.new_zeros(max(self.counts), *x.shape[1:], dtype=dtype)
        padded[: len(self.own)] = x[self.own]
        gathered = self.shards.gather(padded)
        if min(self.counts) == max(self.counts):
            return gathered.flatten(0, 1)
        return torch.cat([part[:count] for part, count in zip(gathered, self.counts, strict=True)])

    def own_rows(self, x: Tensor) -> Tensor:
        """What x [..., K] says of own rows, [..., n], zeros where they were not selected."""
        out = x.new_zeros(*x.shape[:-1], self.n_rows)
        out[..., self.own] = x[..., self.own_part]
        return out

    def own_sums(self, x: Tensor, wanted: Tensor) -> Tensor:
        """Sums over the ranks of x [K, ...], of own rows [n, ...]; only rows that are wanted, bool [K], travel.

        `wanted` is the same on all ranks; other rows are zeros.
        """
        counts = torch.stack([part.sum() for part in wanted.split(self.counts)]).tolist()
        indices = wanted.nonzero().squeeze(1).split(counts)
        padded = x.new_zeros(len(counts), max(counts), *x.shape[1:])
        for some, index in zip(padded, indices, strict=True):
            some[: len(index)] = x[index]
        sums = padded.new_empty(padded.shape[1:])
        if sums.numel():
            dist = torch_distributed()
            scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # before torch 2.13
            scatter(sums.view(-1), padded.view(-1), group=self.shards.group)
        out = x.new_zeros(self.n_rows, *x.shape[1:])
        index = indices[self.shards.rank] - self.own_part.start
        out[self.own[index]] = sums[: len(index)]
        return out
