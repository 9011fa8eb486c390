"""Other packages with these losses: what is taken from them, and their names with versions."""

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..report import version
from .measure import compiles


class Package(NamedTuple):
    title: str
    distribution: str
    needs_gpu: bool
    logits: tuple[str, str] | None  # module and attribute
    linear: tuple[str, str]


PACKAGES = [
    Package(
        "Liger-Kernel",
        "liger-kernel",
        True,
        ("liger_kernel.transformers", "LigerCrossEntropyLoss"),
        ("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss"),
    ),
    Package(
        "quack",
        "quack-kernels",
        True,
        ("quack.cross_entropy", "cross_entropy"),
        ("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
    ),
    Package(
        "cut-cross-entropy",
        "cut-cross-entropy",
        False,
        None,
        ("cut_cross_entropy", "linear_cross_entropy"),
    ),
]
LIGER, QUACK, CUT = PACKAGES


def named(package: Package) -> str:
    return f"{package.title} {version(package.distribution)}"


@functools.cache
def offer(package: Package, kind: str, device: torch.device) -> tuple[Callable | None, str]:
    """What the package has for "logits" or "linear" on this device, or None and the reason why."""
    if version(package.distribution) is None:
        return None, "not installed"
    if package.needs_gpu and device.type != "cuda":
        return None, "needs a GPU"
    module, attribute = getattr(package, kind)
    try:
        return getattr(importlib.import_module(module), attribute), ""
    except Exception as error:  # a package may not know this GPU or this torch, and the others go on
        return None, f"cannot be imported, {type(error).__name__}: {error}"


def missing(kind: str, device: torch.device) -> list[str]:
    """A line for everyone who is not measured, with the reason."""
    lines = [] if compiles(device) else ["torch.compile: no C++ compiler found"]
    for package in PACKAGES:
        if getattr(package, kind) is not None:
            found, reason = offer(package, kind, device)
            if found is None:
                lines.append(f"{package.title}: {reason}")
    return lines
