"""What is compiled: the calls that between them launch every kernel variant."""

import itertools
from typing import NamedTuple

import torch

TRAINING, EVALUATION, RETAINED, LINEAR = "loss + gradient", "loss only", "gradient in backward", "linear, one chunk"
SHARD = "a rank's classes"
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLAGS = (
    (),
    ("softcap",),
    ("smoothing",),
    ("softcap", "smoothing"),
    ("focal",),
    ("focal", "softcap"),
)
LAYOUTS = {  # of the rows: V and what pads them. One for each way in which blocks and alignment can come out
    "aligned": (32000, 0),
    "peeled": (50257, 0),
    "unaligned": (50257, 2),  # gradient and logits disagree
    "one unaligned block": (33, 0),
    "one aligned block": (2048, 0),
    "padded to aligned rows": (50257, 47),  # vectors in, but not out
}
ROWS = 8192
FEW_ROWS = 8  # fewer than any GPU has multiprocessors
CHUNK_ROWS = 512


class Case(NamedTuple):
    path: str
    N: int
    V: int
    layout: str
    dtype: torch.dtype
    flags: tuple[str, ...] = ()
    padding: int = 0
    core: bool = False  # what a row costs is reported too
    liger: bool = False

    @property
    def provider(self) -> str:
        return "Liger-Kernel" if self.liger else "tce_kernels"


def cases(core_only: bool, liger: bool) -> list[Case]:
    """What users launch most, per vocabulary; then every layout, flag and dtype, though not their whole product."""
    bf16 = torch.bfloat16
    found = [
        Case(path, ROWS, V, "given logits", bf16, core=True)
        for path, V in itertools.product((TRAINING, EVALUATION, RETAINED), VOCABULARIES)
    ]
    if liger:
        found += [Case(TRAINING, ROWS, V, "given logits", bf16, core=True, liger=True) for V in VOCABULARIES]
    if core_only:
        return found
    for dtype, (layout, (V, padding)) in itertools.product(DTYPES, LAYOUTS.items()):
        with_flags = layout in ("aligned", "peeled", "unaligned", "one unaligned block")
        for flags in FLAGS if with_flags else FLAGS[:1]:
            found.append(Case(TRAINING, ROWS, V, layout, dtype, flags, padding))
        if with_flags and dtype == torch.bfloat16:  # float16 takes this path by itself
            found.append(Case(RETAINED, ROWS, V, layout, dtype, (), padding))
    for layout, flags in itertools.product(("aligned", "peeled"), FLAGS):
        found.append(Case(SHARD, ROWS, LAYOUTS[layout][0], layout, bf16, flags))
    for layout, (V, padding) in LAYOUTS.items():
        found.append(Case(TRAINING, ROWS, V, layout, bf16, ("entropy",), padding))
    for layout, dtype in itertools.product(("aligned", "peeled"), (torch.float32, torch.float16)):
        found.append(Case(TRAINING, ROWS, LAYOUTS[layout][0], layout, dtype, ("entropy",)))
    for path, layout in itertools.product((TRAINING, EVALUATION, SHARD), ("aligned", "peeled")):
        every_flag = ("entropy", "softcap", "smoothing")
        for flags in (every_flag,) if path == TRAINING else (("entropy",), every_flag):
            found.append(Case(path, ROWS, LAYOUTS[layout][0], layout, bf16, flags))
    found.append(Case(TRAINING, FEW_ROWS, 32000, "few rows", bf16, ("entropy",)))
    for dtype, V in itertools.product(DTYPES, (32000, 50257)):
        found.append(Case(TRAINING, FEW_ROWS, V, "few rows", dtype))
        found.append(Case(LINEAR, CHUNK_ROWS, V, f"chunk of {V}", dtype))
    return found
