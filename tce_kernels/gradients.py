"""The gradients of the linear path: totals over chunks of rows, from all classes or from those of the largest mass.

With a gradient tolerance the classes that together hold at most that share of the absolute mass of G, the gradient
[K, V] of the logits of the K rows that come together, take no part in the matmuls. They are not dropped, which would
bias the gradient, but stand in as the product of their marginals: G[i, j] is taken for m[i] q[j], with m the sums of
the rows over those classes and q the shares that the classes have in the sum of all m. Sums of rows and of columns stay
what they are. Such a tail has rank one, and all tails of a call go through two small matmuls at its end.
"""

import math
from collections import deque
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .head import Head, add_product
from .options import Chunks, Form
from .shards import Shards
from .torch_ops import row_factors

# Where more of the classes than this are left, all of them take part, which is then quicker.
DENSE_ABOVE = 0.7
MOST_ON_THEIR_WAY = 2  # products whose sums over ranks are not waited for yet
TILE_CLASSES = 64  # of which the number of classes is a multiple, so that rows start and end where matmuls like it
ONE = 2**40  # of shares as integers
TAIL_SCALE = 256  # of shares of about 1 / V, so that they are no subnormal numbers in float16


class Gradients:
    """Gradients of input [N, D], weight [V, D] and bias [V], those that are needed; the others stay empty.

    With shards, whose ranks have other classes of the same rows, the products with the weight are parts of sums over
    ranks. They are summed up in the dtype of the totals, while the next rows are worked on; or left as they are with
    `in_parts`.
    """

    count = None  # what a chunk could tell the host besides its kept rows: nothing

    def __init__(
        self, head: Head, needs: Sequence[bool], accumulate_dtype: torch.dtype, shards: Shards | None = None,
        in_parts: bool = False,
    ):  # fmt: skip
        self.head, self.shards, self.in_parts = head, shards, in_parts
        self.on_their_way = deque()  # rows [K], and what waits for their sums [K, D]
        self.needs_input, self.needs_weight, self.needs_bias = needs
        V = len(head.weight)
        total_dtype = torch.promote_types(accumulate_dtype, head.dtype)
        input_dtype = total_dtype if in_parts else head.dtype
        self.input = head.input.new_zeros(head.input.shape if self.needs_input else 0, dtype=input_dtype)
        self.weight = head.weight.new_empty(head.weight.shape if self.needs_weight else 0, dtype=total_dtype)
        self.bias = head.weight.new_zeros(V if self.needs_bias else 0, dtype=total_dtype)
        self.n_rows = self.n_products = 0  # rows that took part, and all their classes that did
        self.beta = 0  # the first product is written, not added, so the weight's total starts uninitialised

    def add(self, dlogits: Tensor, rows: Tensor) -> None:
        """Take in the gradients of the logits [K, V] of some rows [K]."""
        self._count_products(*dlogits.shape)
        if self.needs_input:
            self._take(rows, self._product(dlogits, self.head.weight))
        if self.needs_weight:
            add_product(self.weight, dlogits.t(), self.head.inputs(rows), self.beta)
            self.beta = 1
        if self.needs_bias:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)

    def _count_products(self, n_rows: int, n_classes: int) -> None:
        self.n_rows += n_rows
        self.n_products += n_rows * n_classes

    def _product(self, dlogits: Tensor, weight: Tensor) -> Tensor:
        if self.shards is None:
            return torch.mm(dlogits, weight)
        product = weight.new_empty(len(dlogits), weight.shape[1], dtype=self.weight.dtype)
        add_product(product, dlogits, weight, beta=0)
        return product

    def _take(self, rows: Tensor, product: Tensor) -> None:
        if self.shards is None or self.in_parts:
            self.input[rows] = product
            return
        self.on_their_way.append((rows, self.shards.add_later(product)))
        if len(self.on_their_way) > MOST_ON_THEIR_WAY:
            self._receive()

    def _receive(self) -> None:
        rows, wait = self.on_their_way.popleft()
        self.input[rows] = wait().to(self.input.dtype)

    def finished(self) -> tuple[Tensor, Tensor, Tensor]:
        while self.on_their_way:
            self._receive()
        if self.beta == 0:
            self.weight.zero_()
        return self.input, self.weight, self.bias

    def class_fraction(self) -> float:
        """Mean share of the classes that took part, over the rows that did."""
        return self.n_products / (self.n_rows * len(self.head.weight)) if self.n_products else 1.0


class _Memory:
    """Room for tensors of different sizes, one after the other, which a CPU would take long to map anew each time."""

    def __init__(self, like: Tensor):
        self.memory = like.new_empty(0)

    def __call__(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        if len(self.memory) < size:
            self.memory = self.memory.new_empty(size * 5 // 4)  # the next may be a little larger
        return self.memory[:size].view(shape)


class _Tail(NamedTuple):
    rows: Tensor  # [K]
    row_sums: Tensor  # [K], m
    shares: Tensor  # [V], q


class GradientsOfHeaviestClasses(Gradients):
    """From all but the classes that hold `tolerance` of the mass; row_grad [N] and rows [6, N] are as in `dlogits`.

    For gradients whose entries, those of targets and the constant of label smoothing aside, have one sign in each row:
    all but those of smoothed targets under a softcap.
    """

    def __init__(
        self, head: Head, needs: Sequence[bool], accumulate_dtype: torch.dtype, tolerance: float,
        row_operations: ModuleType, form: Form, row_grad: Tensor, rows: Tensor, shards: Shards | None = None,
        in_parts: bool = False,
    ):  # fmt: skip
        super().__init__(head, needs, accumulate_dtype, shards, in_parts)
        self.n_all_classes = len(head.weight) if shards is None else shards.n_classes
        self.tolerance, self.row_operations, self.form = tolerance, row_operations, form
        self.row_grad, self.rows = row_grad, rows
        self.tails: list[_Tail] = []
        self.head_memory = _Memory(head.weight)
        self.weight_memory = _Memory(self.weight) if self.weight.dtype != head.dtype else self.head_memory
        self._wait_for_rows()

    def _wait_for_rows(self) -> None:
        V = len(self.head.weight)
        # By the sign that a row's gradient has apart from its target: sums over the rows, and of their constants. One
        # tail for both signs would divide by a sum that is next to 0.
        self.sums = self.row_grad.new_zeros(2, V)
        self.sums_of_ones = self.row_grad.new_zeros(2)
        self.mass_of_targets = self.row_grad.new_zeros(())  # beyond what the sums have of it
        self.is_target = self.row_grad.new_zeros(V + 1, dtype=torch.bool)
        self.n_negative = self.row_grad.new_zeros((), dtype=torch.int64)

    def count(self, dlogits: Tensor, target: Tensor, row_grad: Tensor, rows: Tensor) -> Tensor:
        """Take in the masses of dlogits [n, V], whose dropped rows may hold anything.

        Returns how many classes could be left out, and how many rows are negative, of those that wait: int64 [2].
        """
        n, V = dlogits.shape
        _, of_p, of_target = row_factors(row_grad, rows, self.form)
        live, negative = of_target != 0, of_p < 0
        of_ones = of_target * (self.form.label_smoothing / self.n_all_classes)
        groups = torch.stack([live & ~negative, live & negative])
        self.sums += self.row_operations.class_sums(dlogits, groups)
        self.sums_of_ones += torch.where(groups, of_ones, 0).sum(1)
        self.n_negative += groups[1].sum()

        # Targets take part whatever their mass is, of which the sums above have the wrong sign.
        index = torch.where(live & (target >= 0) & (target < V), target, V)
        self.is_target[index] = True
        entry = dlogits[torch.arange(n, device=index.device), index.clamp(max=V - 1)] + of_ones
        mass = torch.where(negative, entry.abs() + entry, entry.abs() - entry)
        self.mass_of_targets += torch.where(live, mass, 0).sum()

        positive_sums, negative_sums = self.sums + self.sums_of_ones[:, None]
        masses = positive_sums - negative_sums
        shares = masses / (masses.sum() + self.mass_of_targets)
        # Never left out: targets, and whatever a NaN has touched.
        shares, self.order = torch.where(self.is_target[:V] | ~(shares <= 1), 2, shares).sort()
        # In integers, since a GPU adds up floats in an order that may differ from call to call.
        n_left_out = ((shares * ONE).ceil().long().cumsum(0) <= int(self.tolerance * ONE)).sum()
        return torch.stack([n_left_out, self.n_negative])

    def learn(self, n_left_out: int, n_negative: int) -> None:
        """What `count` counted, as the host knows it."""
        V = len(self.head.weight)
        self.n_classes = min(-(-(V - n_left_out) // TILE_CLASSES) * TILE_CLASSES, V)
        self.has_negative = n_negative > 0

    def add(self, dlogits: Tensor, rows: Tensor) -> None:
        K, V = dlogits.shape
        if self.n_classes > DENSE_ABOVE * V:
            super().add(dlogits, rows)
        else:
            self._count_products(K, self.n_classes)
            self._add_classes(dlogits, rows)
        self._wait_for_rows()

    def _add_classes(self, dlogits: Tensor, rows: Tensor) -> None:
        n_left_out = dlogits.shape[1] - self.n_classes
        classes = self.order[n_left_out:].sort().values
        if self.needs_bias:
            self.bias += self.sums.sum(0)
        row_sums = self.row_operations.keep_classes(dlogits, classes)
        dlogits = dlogits[:, : self.n_classes]
        tails = self._tails(rows, row_sums, classes, n_left_out) if self.needs_input or self.needs_weight else []
        if self.needs_input:
            weight = self.head_memory(self.n_classes, self.head.weight.shape[1])
            torch.index_select(self.head.weight, 0, classes, out=weight)
            product = self._product(dlogits, weight)
            if self.shards is not None:  # before it leaves for the other ranks
                for tail, of_tail in zip(tails, self._products_of_tails(tails), strict=True):
                    product += (tail.row_sums[:, None] * of_tail).to(product.dtype)
            self._take(rows, product)
        if self.needs_weight:
            if self.beta == 0:
                self.weight.zero_()
                self.beta = 1
            product = self.weight_memory(self.n_classes, self.weight.shape[1])
            add_product(product, dlogits.t(), self.head.inputs(rows), beta=0)
            self.row_operations.add_rows(self.weight, classes, product)
        self.tails += tails

    def _tails(self, rows: Tensor, row_sums: Tensor, classes: Tensor, n_left_out: int) -> list[_Tail]:
        """The marginals of dlogits over the classes left out, of which row_sums [K] are the one."""
        tails = []
        _, of_p, of_target = row_factors(self.row_grad[rows], self.rows[:, rows], self.form)
        sums = self.sums
        if self.form.label_smoothing:  # the constant has rank one by itself
            of_ones = of_target * (self.form.label_smoothing / self.n_all_classes)
            row_sums, sums = row_sums + of_ones * n_left_out, sums + self.sums_of_ones[:, None]
            tails.append(_Tail(rows, -of_ones, torch.ones_like(sums[0]).index_fill(0, classes, 0)))
        sums = sums.index_fill(1, classes, 0)
        negative = of_p < 0
        for of_sign, group in zip(sums, (~negative, negative) if self.has_negative else (~negative,), strict=False):
            total = of_sign.sum()
            shares = of_sign / torch.where(total == 0, 1, total)
            tails.append(_Tail(rows, torch.where(group, row_sums, 0), shares))
        return tails

    def finished(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.tails:
            with torch.autocast(self.head.input.device.type, enabled=False):  # the dtypes have been chosen
                if self.needs_input and self.shards is None:
                    for tail, product in zip(self.tails, self._products_of_tails(self.tails), strict=True):
                        self.input[tail.rows] += (tail.row_sums[:, None] * product).to(self.input.dtype)
                if self.needs_weight:
                    self._add_tails_to_weight()
        return super().finished()

    def _products_of_tails(self, tails: list[_Tail]) -> Tensor:
        """The shares of each tail times the weight, [number of tails, D]."""
        shares = torch.stack([tail.shares for tail in tails])
        return torch.mm((TAIL_SCALE * shares).to(self.head.dtype), self.head.weight).to(shares.dtype) / TAIL_SCALE

    def _add_tails_to_weight(self) -> None:
        shares = torch.stack([tail.shares for tail in self.tails])
        inputs = [tail.row_sums @ self.head.inputs(tail.rows).to(shares.dtype) for tail in self.tails]
        inputs = torch.stack(inputs)
        if self.weight.dtype == shares.dtype:
            self.weight.addmm_(shares.t(), inputs)
        else:
            for some, some_shares in zip(self.weight.split(4096), shares.t().split(4096), strict=True):
                some += (some_shares @ inputs).to(some.dtype)


def gradients_for(
    head: Head, needs: Sequence[bool], chunks: Chunks, row_operations: ModuleType, form: Form, row_grad: Tensor,
    rows: Tensor, *of_ranks,
) -> Gradients:  # fmt: skip
    """Exact, or within the tolerance where entries have the sign that it takes. of_ranks: shards, in_parts."""
    tolerance = float(chunks.gradient_tolerance)
    if tolerance == 0 or form.label_smoothing and form.softcap is not None or len(head.weight) == 0:
        return Gradients(head, needs, chunks.accumulate_dtype, *of_ranks)
    return GradientsOfHeaviestClasses(
        head, needs, chunks.accumulate_dtype, tolerance, row_operations, form, row_grad, rows, *of_ranks
    )
