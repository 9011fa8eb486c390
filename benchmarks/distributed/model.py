"""A model of the head and its loss over p GPUs, forward and backward, from published and assumed figures alone.

Two queues, as on a GPU: one computes, one communicates, each in order. The loss multiplies a chunk's logits while the
sums of the chunk before it are gathered, and the host learns how many rows are kept of the one before that; and it
multiplies the weight's gradient while the input's is summed over the ranks.
"""

from typing import NamedTuple

from tce_kernels.head import auto_chunk_size

# Published: NVIDIA H100 datasheet (SXM: 989 TFLOPS of dense bfloat16, 3.35 TB/s, NVLink 900 GB/s in both directions
# together), DGX H100 datasheet (8 adapters of 400 Gb/s for 8 GPUs). Assumed: the shares of it that are reached.
FLOPS = 0.65 * 989e12  # of a matmul, whatever its shape
MEMORY = 0.85 * 3.35e12  # bytes a second
NVLINK = 0.8 * 450e9  # bytes a second, each way, as the next
ADAPTERS = 0.5 * 8 * 50e9  # the way out of a node, which a ring passes with all adapters, for messages of some 10 MB
ONE_ADAPTER = 0.9 * 50e9  # where a ring passes with one
# All assumed.
NODE = 8  # GPUs
LATENCY = 15e-6  # seconds of a collective of a few bytes within a node
LATENCY_BETWEEN_NODES = 40e-6
HOST_WAIT = 50e-6  # a chunk: a copy to the host, and a dozen launches before there is much to do for the GPU again
TAKEN = 0.1  # of the multiprocessors by a collective while it runs, in `efficiency_shared` only

LOGIT_BYTES = 2  # bfloat16: logits, input, weight and logits' gradient
SUM_BYTES = 3 * 4  # a row's maximum, sum of exponentials and target's logit, float32
AHEAD = 2  # chunks
DX_BYTES = 4  # the input's gradient is summed in float32
SHARES = (1.0, 0.5, 0.2)  # of the rows that are kept
RANKS = (1, 2, 4, 8, 16, 32, 64)
N, D, V = 8192, 4096, 128256  # tokens of a step, and the head of Llama 3's 8B


class Head(NamedTuple):
    """`rows`: "replicated", N rows on all ranks; "sharded", N / p on each."""

    p: int
    kept: float
    rows: str = "replicated"
    N: int = N
    D: int = D
    V: int = V
    between_nodes: float = ADAPTERS


class Seconds(NamedTuple):
    compute: float
    communication: float
    serial: float  # one after the other
    overlapped: float


def chunk_rows(head: Head) -> int:
    """As the package chooses them."""
    return auto_chunk_size(head.N, -(-head.V // head.p), LOGIT_BYTES, on_cpu=False, over_ranks=head.p > 1)


def collective(head: Head, sent: float) -> float:
    """Seconds in which every rank sends so many bytes to the next one of a ring."""
    if head.p <= NODE:
        return LATENCY + sent / NVLINK
    return LATENCY_BETWEEN_NODES + sent / head.between_nodes


def seconds(head: Head) -> Seconds:
    serial, overlapped = Queues(overlapped=False), Queues(overlapped=True)
    for queues in (serial, overlapped):
        step(head, queues)
    return Seconds(serial.compute, serial.communication, serial.end, overlapped.end)


class Queues:
    """Of computations and of collectives. Times at which things end, in seconds from the start."""

    def __init__(self, overlapped: bool):
        self.overlapped = overlapped
        self.computed = self.communicated = 0.0
        self.compute = self.communication = 0.0  # the sum of what was done

    def calculate(self, duration: float, after: float = 0.0) -> float:
        self.compute += duration
        self.computed = max(self.computed, after) + duration
        return self.computed

    def communicate(self, duration: float) -> float:
        """Begins when all has been computed that was asked for before."""
        self.communication += duration
        self.communicated = max(self.communicated, self.computed) + duration
        if not self.overlapped:
            self.computed = self.communicated
        return self.communicated

    @property
    def end(self) -> float:
        return max(self.computed, self.communicated)


def step(head: Head, queues: Queues) -> None:
    """What one call puts into the queues, in the order of the package: over ranks with AHEAD more chunks begun."""
    p, kept, rows, N, D, V, _ = head
    alone, others = p == 1, (p - 1) / p
    columns = V / p
    chunk = chunk_rows(head)
    ahead = 0 if alone else AHEAD
    waiting = [0.0] * (1 + ahead)  # kept rows in a buffer, until half a chunk has come together
    begun = []  # chunks: buffer, rows, when the sums of all ranks are there, when the number of kept rows is known

    def begin(buffer, n):
        """Logits and their sums, which then travel."""
        ready = queues.calculate(2 * n * D * columns / FLOPS + n * columns * LOGIT_BYTES / MEMORY)
        begun.append(
            [buffer, n, ready if alone else queues.communicate(collective(head, (p - 1) * n * SUM_BYTES)), None]
        )

    def combine(work):
        """The loss, and which rows are kept, once; of hardly any duration."""
        if work[3] is None:
            work[3] = queues.calculate(0.0, after=work[2])

    def end():
        combine(begun[0])
        buffer, n, _, known = begun.pop(0)
        # Gradients are written; before that, rows that are apart move together, and their logits are read again if the
        # sums had to be gathered first: whole rows are still in the cache.
        passes = kept * (1 + 2 * (1 - kept) + (not alone))
        queues.calculate(passes * n * columns * LOGIT_BYTES / MEMORY, after=known + HOST_WAIT)
        waiting[buffer] += n * kept
        if waiting[buffer] > (chunk - 1) // 2:
            multiply(buffer)

    def multiply(buffer):
        n, waiting[buffer] = waiting[buffer], 0.0
        if n == 0:
            return
        product = 2 * n * D * columns / FLOPS
        queues.calculate(product)  # gradient of the input
        if rows == "replicated" and not alone:  # a reduce-scatter and an all-gather
            queues.communicate(2 * collective(head, others * n * D * DX_BYTES))
        queues.calculate(product)  # and of the weight

    if rows == "sharded" and not alone:
        queues.computed = queues.communicate(collective(head, others * N * D * LOGIT_BYTES))
    for i, start in enumerate(range(0, N, chunk)):
        begin(i % len(waiting), min(chunk, N - start))
        for work in begun[:-1]:
            combine(work)
        if len(begun) > ahead:
            end()
    for work in begun:
        combine(work)
    while begun:
        end()
    for buffer in range(len(waiting)):
        multiply(buffer)
    if rows == "sharded" and not alone:
        queues.communicate(collective(head, others * kept * N * D * DX_BYTES))


def efficiency(head: Head, overlapped: bool = True) -> float:
    """Speed-up over one GPU, over p."""
    alone, together = seconds(head._replace(p=1)), seconds(head)
    return alone.overlapped / (together.overlapped if overlapped else together.serial) / head.p


def table() -> list[dict]:
    """A row per number of GPUs, share of kept rows and layout of the rows, times in milliseconds."""
    found = []
    for rows in ("replicated", "sharded"):
        for kept in SHARES:
            for p in RANKS:
                head = Head(p, kept, rows)
                times = seconds(head)
                shared = times.overlapped + TAKEN * times.communication
                found.append(
                    dict(rows=rows, kept=kept, p=p, chunk_rows=chunk_rows(head))
                    | {f"{name}_ms": round(1e3 * value, 3) for name, value in times._asdict().items()}
                    | dict(
                        efficiency_serial=round(efficiency(head, overlapped=False), 4),
                        efficiency=round(efficiency(head), 4),
                        efficiency_shared=round(efficiency(head) * times.overlapped / shared, 4),
                        efficiency_one_adapter=round(efficiency(head._replace(between_nodes=ONE_ADAPTER)), 4),
                    )
                )
    return found


class Shard(NamedTuple):
    """A head whose weight FSDP2 has sharded over p data-parallel ranks. Mebibytes that each of them sends."""

    p: int
    N: int  # rows of a rank
    valid: float  # share of them that are not ignored
    kept: float  # share of those

    @property
    def weight_once(self) -> float:
        """Gathered in bfloat16 and kept until backward; its gradient reduced in float32."""
        return (self.p - 1) / self.p * V * D * (LOGIT_BYTES + 4) / 2**20

    @property
    def weight_twice(self) -> float:
        """Gathered for the forward pass and again for the backward one."""
        return (self.p - 1) / self.p * V * D * (2 * LOGIT_BYTES + 4) / 2**20

    @property
    def rows(self) -> float:
        """The rows travel instead, and gradients of the kept ones come back."""
        return (self.p - 1) * self.N * self.valid * (D * (LOGIT_BYTES + self.kept * DX_BYTES) + SUM_BYTES) / 2**20


SHARDS = [
    Shard(p, n, valid, kept)
    for p, n, valid, kept in [
        (8, 8192, 1.0, 1.0), (8, 8192, 1.0, 0.5), (8, 8192, 0.5, 0.5), (8, 2048, 1.0, 1.0),
        (16, 8192, 1.0, 1.0), (16, 8192, 1.0, 0.5), (64, 8192, 1.0, 0.5),
    ]
]  # fmt: skip


def shard_table() -> list[dict]:
    return [
        shard._asdict()
        | {name: round(getattr(shard, name)) for name in ("weight_twice", "weight_once", "rows")}
        | dict(over_weight_once=round(shard.rows / shard.weight_once, 2))
        for shard in SHARDS
    ]
