"""What a rank sends in a forward and backward pass: ours, the formulas, Megatron's scheme and gathered logits."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from . import counted
from .cases import (
    GATHERED,
    LOGITS,
    MEGATRON,
    NO_GRADIENT,
    OURS,
    REPLICATED,
    SCHEMES,
    SHARDED,
    Reference,
    Scheme,
    Shape,
    inputs_for,
    own,
    run,
)

SUMS = 3 * 4  # bytes a row, float32
KEPT = (1.0, 0.8, 0.5, 0.2, 0.05)


def formula(scheme: Scheme, shape: Shape, itemsize: int, kept: float, p: int) -> float:
    """Bytes that a rank sends: sums of rows, rows themselves, gradients of rows. Without agreement and padding."""
    N, D, V = shape
    ring = (p - 1) / p
    sums, gradient = (p - 1) * N * SUMS, ring * (N - round((1 - kept) * N)) * D * 4
    theirs = 2 * ring * N * SUMS
    row = ring * N * D * itemsize
    return {
        (OURS, LOGITS): sums,
        (OURS, NO_GRADIENT): sums,
        (OURS, REPLICATED): sums + 2 * gradient,
        (OURS, SHARDED): sums + row + gradient,
        (MEGATRON, LOGITS): theirs,
        (MEGATRON, REPLICATED): theirs + 2 * row,
        (MEGATRON, SHARDED): theirs + 3 * row,
        (GATHERED, LOGITS): ring * N * V * itemsize,
    }[scheme.provider, scheme.what]


def measure(shape: Shape, dtypes: list[torch.dtype], shares: tuple[float, ...]) -> Iterator[dict]:
    """Of every rank; a row of results per dtype, share of kept rows and scheme, once its result is right."""
    for dtype in dtypes:
        for kept in shares:
            reference = Reference(inputs_for(shape, dtype, kept, torch.device("cpu")))
            for scheme in SCHEMES:
                if scheme.truncates or kept == shares[0]:  # the others send the same whatever is kept
                    yield row_of(scheme, shape, reference, kept)


def row_of(scheme: Scheme, shape: Shape, reference: Reference, kept: float) -> dict:
    p = dist.get_world_size()
    tensors = own(reference.inputs, scheme)
    reference.check(scheme, run(scheme, tensors))
    dtype = reference.inputs.input.dtype
    found = counted.collectives(lambda: run(scheme, tensors))
    sent = torch.tensor([
        sum(each.sent for each in found),
        sum(each.sent for each in found if not each.of_numbers),
        sum(each.sent_by_gloo for each in found),
    ])  # fmt: skip
    dist.all_reduce(sent)
    sent, agreement, by_gloo = (sent / p).tolist()
    read = counted.over_loopback(lambda: run(scheme, tensors))
    return shape._asdict() | dict(
        p=p,
        dtype=str(dtype).removeprefix("torch."),
        provider=scheme.provider,
        what=scheme.what,
        kept=kept,
        collectives=len(found),
        formula_bytes=round(formula(scheme, shape, dtype.itemsize, kept, p)),
        sent_bytes=round(sent),
        agreement_bytes=round(agreement),
        sent_by_gloo_bytes=round(by_gloo),
        loopback_bytes="" if read is None else round(read),
    )
