"""What a compiled NVIDIA kernel executes, from its disassembly: the work of one row of logits.

The listing becomes basic blocks, the blocks loops. A loop over the columns is told by what it moves: it reads the row
(sweep), reads it and writes the gradient (gradient), or only writes (fill). Whatever else is found raises ValueError.
"""

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);")
LABEL = re.compile(r"^(\.L\w+):")
TARGET = re.compile(r"`\((\S+?)\)")
END = -1  # what follows the last block of a program
WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)\b")


class Work(NamedTuple):
    """What one thread does along a path."""

    instructions: int = 0
    special_functions: int = 0
    barriers: int = 0
    loads: int = 0  # from global memory
    stores: int = 0
    loaded_bytes: int = 0
    stored_bytes: int = 0
    guarded_loads: int = 0  # under a predicate
    guarded_stores: int = 0

    def plus(self, other: "Work", times: int = 1) -> "Work":
        return Work(*(a + times * b for a, b in zip(self, other, strict=True)))


class Block(NamedTuple):
    work: Work
    successors: list[int]
    calls: bool  # a subroutine: a division's slow path


class Loop(NamedTuple):
    header: int
    blocks: frozenset[int]


class ColumnLoop(NamedTuple):
    """An innermost loop over the columns of a row; `work` is that of one iteration and one thread."""

    role: str  # "sweep", "gradient" or "fill"
    masked: bool
    logits: int  # per iteration, of all threads
    work: Work  # of an iteration that does all it can
    idle: Work | None  # of an iteration that loads nothing, if there is such a path


class RowWork(NamedTuple):
    """Per row, of one thread: of a row that is kept, and of one that is dropped after its loss is known."""

    kept: Work
    dropped: Work | None  # None if its gradient loops load whatever happens
    loops: list[ColumnLoop]
    persistent: bool  # a program takes one row after the other


def disassemble(cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout


def work_of(opcode: str, guarded: bool) -> Work:
    load, store = opcode.startswith("LDG"), opcode.startswith("STG")
    width = WIDTH.search(opcode)
    bytes_ = int(width[1]) // 8 if width else 4
    return Work(
        instructions=1,
        special_functions=opcode.startswith("MUFU"),
        barriers=opcode.startswith("BAR"),
        loads=load,
        stores=store,
        loaded_bytes=bytes_ * load,
        stored_bytes=bytes_ * store,
        guarded_loads=load and guarded,
        guarded_stores=store and guarded,
    )


def blocks_of(listing: str) -> list[Block]:
    """Basic blocks in the order of the code, of which the first is the entry."""
    pieces, labels = [[]], {}
    for line in listing.splitlines():
        if label := LABEL.match(line):
            pieces.append([])
            labels[label[1]] = len(pieces) - 1
        elif found := INSTRUCTION.search(line):
            pieces[-1].append(found)
            if root(found) in ("BRA", "CALL", "EXIT", "RET", "BRX", "JMP", "JMX"):
                pieces.append([])
    blocks = []
    for i, piece in enumerate(pieces):
        work = Work()
        for found in piece:
            work = work.plus(work_of(found["opcode"], found["guard"] is not None))
        successors = leads_to(piece[-1], i, labels) if piece else [i + 1]
        calls = bool(piece) and root(piece[-1]) == "CALL" and not jumps(piece[-1])
        blocks.append(Block(work, [s if s < len(pieces) else END for s in successors], calls))
    return blocks


def root(found: re.Match) -> str:
    return found["opcode"].partition(".")[0]


def jumps(found: re.Match) -> bool:
    """Whether the instruction may go on elsewhere in the kernel. Calls of a label there are jumps too (sm_80)."""
    if root(found) == "CALL":
        return "`(.L" in found["operands"]
    return root(found) == "BRA" and ".DIV" not in found["opcode"]  # BRA.DIV is for warps that have diverged


def leads_to(last: re.Match, i: int, labels: dict[str, int]) -> list[int]:
    """Blocks that may follow block i, which ends in this instruction."""
    if root(last) in ("BRX", "JMP", "JMX"):
        raise ValueError(f"cannot follow {last['opcode']}{last['operands']}")
    if jumps(last):
        target = labels[TARGET.search(last["operands"])[1]]
        before = last["operands"].partition("`")[0]
        return [target, i + 1] if last["guard"] or re.search(r"U?P\d", before) else [target]
    if root(last) in ("EXIT", "RET"):
        return [END, i + 1] if last["guard"] else [END]
    return [i + 1]


def loops_of(blocks: list[Block]) -> list[Loop]:
    """Natural loops in the order of the code."""
    seen, path, back = set(), [], []

    def visit(block):
        seen.add(block)
        path.append(block)
        for successor in blocks[block].successors:
            if successor == END:
                continue
            if successor in path:
                back.append((block, successor))
            elif successor not in seen:
                visit(successor)
        path.pop()

    visit(0)
    predecessors = {block: [p for p in seen if block in blocks[p].successors] for block in seen}
    bodies = {}
    for source, header in back:
        body, reached = bodies.setdefault(header, {header}), [source]
        while reached:
            block = reached.pop()
            if block not in body:
                body.add(block)
                reached.extend(predecessors[block])
    return [Loop(header, frozenset(bodies[header])) for header in sorted(bodies)]


def path(
    blocks: list[Block], entry: int, region: frozenset[int], inner: dict[int, tuple[Work, list[int]] | None], choose
) -> Work | None:
    """The path that moves the most (least) for choose = max (min), with the fewest instructions for that.

    It goes from entry back to it or, in the region, to END.

    `inner` replaces a loop, named by its header, by its work and the blocks that follow it; None forbids it. So are
    subroutine calls, which are slow paths.
    """

    @cache
    def onward(block):
        if block in inner:
            if inner[block] is None:
                return None
            work, successors = inner[block]
        elif blocks[block].calls:
            return None
        else:
            work, successors = blocks[block].work, blocks[block].successors
        rests = [Work() if s in (entry, END) else onward(s) for s in successors if s in region]
        found = [work.plus(rest) for rest in rests if rest is not None]
        return choose(found, key=lambda work: (moved(work), -work.instructions), default=None)

    return onward(entry)


def moved(work: Work) -> int:
    return work.loaded_bytes + work.stored_bytes


def column_loop(blocks: list[Block], loop: Loop, threads: int, item_bytes: int) -> ColumnLoop:
    work = path(blocks, loop.header, loop.blocks, {}, max)
    if work is None or not (work.loads or work.stores):
        raise ValueError(f"a loop that moves no logits, or has only slow paths: {work}")
    idle = path(blocks, loop.header, loop.blocks, {}, min)
    return ColumnLoop(
        role="sweep" if not work.stores else "gradient" if work.loads else "fill",
        masked=bool(work.guarded_stores if work.stores else work.guarded_loads),
        logits=(work.stored_bytes or work.loaded_bytes) * threads // item_bytes,
        work=work,
        idle=None if idle.loads else idle,
    )


def trips_of(loops: list[ColumnLoop], V: int) -> list[int]:
    """Iterations of each of the loops that share a row of V logits: whole blocks in order, the masked loop the rest.

    Loops that follow a masked one go through the row again, which rows of ordinary logits never need: no iterations.
    """
    left, trips = V, []
    for i, loop in enumerate(loops):
        if any(other.masked for other in loops[:i]):
            trips.append(0)
            continue
        trips.append(-(-left // loop.logits) if loop.masked else left // loop.logits)
        left = max(left - trips[-1] * loop.logits, 0)
    if left:
        raise ValueError(f"{left} of {V} logits are in none of the loops {loops}")
    return trips


def row_work(listing: str, V: int, threads: int, item_bytes: int) -> RowWork:
    """Work per row of V logits of `item_bytes` bytes, of a kernel whose blocks take whole rows."""
    blocks = blocks_of(listing)
    loops = loops_of(blocks)
    innermost = [loop for loop in loops if not any(other.header in loop.blocks for other in loops if other != loop)]
    outer = [loop for loop in loops if loop not in innermost]
    if len(outer) > 1 or any(not loop.blocks <= outer[0].blocks for loop in innermost if outer):
        raise ValueError(f"loops that are neither over rows nor over the columns of one: {outer}")
    found = {loop: column_loop(blocks, loop, threads, item_bytes) for loop in innermost}
    trips = {}
    for role in ("sweep", "gradient", "fill"):
        of_role = [loop for loop in innermost if found[loop].role == role]
        trips |= zip(of_role, trips_of([found[loop] for loop in of_role], V) if of_role else [], strict=True)

    def row(dropped):
        inner = {}
        for loop, column in found.items():
            work = column.idle if dropped and column.role == "gradient" else column.work
            exits = sorted({s for block in loop.blocks for s in blocks[block].successors} - loop.blocks)
            skipped = work is None or trips[loop] == 0
            inner[loop.header] = None if skipped else (Work().plus(work, trips[loop]), exits)
        entry, region = (outer[0].header, outer[0].blocks) if outer else (0, frozenset(range(END, len(blocks))))
        work = path(blocks, entry, region, inner, max)
        if work is None:
            raise ValueError(f"no path through the loops {list(found.values())}")
        return work

    columns = list(found.values())
    writes_zeros = any(c.role == "fill" for c in columns) or all(c.idle for c in columns if c.role == "gradient")
    return RowWork(row(dropped=False), row(dropped=True) if writes_zeros else None, columns, bool(outer))
