"""Losses of other packages whose classes are spread over ranks, as `cases.Scheme`s. None of them truncates."""

import importlib
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..report import version
from .cases import LOGITS, REPLICATED, Scheme
from .schemes import SummedInput

Losses = dict[str, Callable[..., Tensor]]  # by what they are of


class Unavailable(Exception):
    """Why a package is not measured."""


def offered(device: torch.device, dtype: torch.dtype) -> tuple[list[Scheme], list[str]]:
    """Of all that can be measured here; and a line for each of the others, with the reason."""
    found, missing = [], []
    for title, distribution, needs_gpu, load in PACKAGES:
        installed = version(distribution)
        try:
            if installed is None:
                raise Unavailable("not installed")
            if needs_gpu and device.type != "cuda":
                raise Unavailable("needs a GPU")
            losses = load(device, dtype)
        except Unavailable as reason:
            missing.append(f"{title}{f' {installed}' if installed else ''}: {reason}")
        except Exception as error:  # a package may not know this GPU or this torch, and the others go on
            missing.append(f"{title} {installed}: cannot be imported, {type(error).__name__}: {error}")
        else:
            found += [Scheme(f"{title} {installed}", what, loss) for what, loss in losses.items()]
    return [*found, *loss_parallel(device)], missing


def attribute(module: str, name: str):
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise Unavailable(f"has no {module}.{name}") from error


def liger(device: torch.device, dtype: torch.dtype) -> Losses:
    """The first is of three-dimensional logits. The second communicates inside of its kernels where it can."""
    of_logits = attribute("liger_kernel.transformers", "LigerVocabParallelCrossEntropy")()
    linear = attribute(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy", "LigerFusedLinearScaledCrossEntropyTPFunction"
    )
    return {
        LOGITS: lambda logits, target: of_logits(logits[:, None], target[:, None], dist.group.WORLD).mean(),
        REPLICATED: lambda input, weight, target: linear.apply(input, weight, target, dist.group.WORLD).mean(),
    }


def cut_cross_entropy(device: torch.device, dtype: torch.dtype) -> Losses:
    options = attribute("cut_cross_entropy.vocab_parallel", "VocabParallelOptions")
    loss = attribute("cut_cross_entropy", "linear_cross_entropy")
    impl = "cce" if device.type == "cuda" else "torch_compile"

    def linear(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        V = dist.get_world_size() * len(weight)
        return loss(input, weight, target, impl=impl, vocab_parallel_options=options.from_vocab(V, dist.group.WORLD))

    return {REPLICATED: linear}


def megatron(device: torch.device, dtype: torch.dtype) -> Losses:
    """Of three-dimensional logits. Float32 ones it would overwrite."""
    if dtype != torch.bfloat16:
        raise Unavailable("its gradient is in bfloat16")
    loss = attribute("megatron.core.fusions.fused_cross_entropy", "fused_vocab_parallel_cross_entropy")

    def of_logits(logits: Tensor, target: Tensor) -> Tensor:
        return loss(logits[:, None], target[:, None], dist.group.WORLD).mean()

    def linear(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return of_logits(F.linear(SummedInput.apply(input), weight), target)

    return {LOGITS: of_logits, REPLICATED: linear}


PACKAGES = [
    ("Liger-Kernel", "liger-kernel", True, liger),
    ("cut-cross-entropy", "cut-cross-entropy", False, cut_cross_entropy),
    ("Megatron-core", "megatron-core", False, megatron),
]


def loss_parallel(device: torch.device) -> list[Scheme]:
    """PyTorch's own, of DTensors."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import loss_parallel as context

    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)

    def on_mesh(x: Tensor, placement) -> DTensor:
        return DTensor.from_local(x, mesh, [placement], run_check=False)

    def of_logits(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(on_mesh(logits, Shard(1)).float(), on_mesh(target, Replicate())).to_local()

    def linear(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = F.linear(on_mesh(input, Replicate()), on_mesh(weight, Shard(0)))
        return F.cross_entropy(logits.float(), on_mesh(target, Replicate())).to_local()

    losses = {LOGITS: of_logits, REPLICATED: linear}
    return [Scheme("DTensor, loss_parallel", what, loss, context=context) for what, loss in losses.items()]
