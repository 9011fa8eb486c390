"""What stands between a call and its memory: compilers, transforms, dispatch modes, tangents, symbolic numbers."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether the tensors (None aside) are memory and nothing else, so that nobody sees it written to or looked at.

    A compiler, a tracer, a dispatch mode (selective checkpointing, say), a functional transform or a tensor subclass
    would not learn of what happens outside of registered operators.
    """
    return (
        not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
        and all(tensor is None or _is_memory(tensor) for tensor in tensors)
    )


def has_data(tensor: Tensor) -> bool:
    """Whether a tensor has numbers to look at: it is neither fake nor on "meta", nor stands for others."""
    return not torch.compiler.is_compiling() and _is_memory(tensor)


def _is_memory(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not tensor.is_meta
        and torch._C._has_storage(tensor)
        and not tensor.is_neg()  # whose numbers PyTorch negates when it reads them
        and not tensor._is_zerotensor()  # zeros of no memory
    )


def has_tangent(tensor: Tensor | None) -> bool:
    """Whether forward-mode differentiation goes through a tensor."""
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def graph_is_kept() -> bool:
    """Within a backward call: whether it leaves the graph for another (retain_graph)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


# The compilers of older versions refuse to go through `statically_known_true`.
_MAY_BE_UNKNOWN = torch.__version__ >= "2.9"


def holds(condition: bool) -> bool:
    """A condition on numbers or sizes; False where only data, or a guard of the compiler, could tell.

    Before torch 2.9 the compiler guards: a number that changes is compiled anew, one that is unknown is an error.
    """
    if not _MAY_BE_UNKNOWN or isinstance(condition, (bool, Tensor)) and not torch.compiler.is_compiling():
        return condition  # a tensor where torch.jit traces
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return statically_known_true(condition)
