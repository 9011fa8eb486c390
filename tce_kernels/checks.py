"""What the arguments of the losses must be. Checks run before anything is computed, and read no tensor's data.

Nor do they put a guard on what a compiler holds to be unknown: `context.holds`.
"""

from numbers import Real

import torch
from torch import Tensor

from .context import has_tangent, holds
from .layout import are_disjoint, rows_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def check_tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_plain(name: str, value) -> None:
    """A tensor that is no DTensor, since what it belongs to is none."""
    check_tensor(name, value)
    if hasattr(value, "full_tensor"):
        per_row = name in ("target", "token_weight")
        raise TypeError(
            f"{name} must be a plain tensor where the logits or the input are, got a DTensor with placements "
            f"{value.placements}: pass "
            + (f"what it holds for this rank's rows, {name}.to_local()" if per_row else f"{name}.full_tensor()")
        )


def check_number(name: str, value, rule: str, refused) -> None:
    """`refused(value)`: conditions, none of which may hold."""
    known = type(value) in (int, float) and not torch.compiler.is_compiling()
    if not known and (isinstance(value, bool) or not isinstance(value, (Real, torch.SymInt, torch.SymFloat))):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    conditions = refused(value)
    if any(conditions) if known else any(map(holds, conditions)):
        raise ValueError(f"{name} must be {rule}, got {value}")


def check_flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_stats(name: str, value) -> None:
    if not isinstance(value, bool) and not (isinstance(value, str) and value == "entropy"):
        raise TypeError(f"{name} must be True or False, got {value!r}; or 'entropy', which adds that of each row")


def check_choice(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_group(value) -> None:
    import torch.distributed as dist  # slow to import

    if not isinstance(value, dist.ProcessGroup):
        outside = dist.is_available() and value is dist.GroupMember.NON_GROUP_MEMBER
        raise TypeError(
            "group must be None or a torch.distributed.ProcessGroup, got "
            + ("a group that this rank does not belong to" if outside else type(value).__name__)
        )


def check_constant(name: str, value: Tensor) -> None:
    """A tensor option: floating or integer, and not differentiated."""
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be a tensor of real numbers, got {value.dtype}")
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad: the loss has no gradient for it, so pass {name}.detach()")
    if has_tangent(value):
        raise ValueError(
            f"{name} must not carry a forward-mode tangent: the loss has no derivative for it, so pass "
            f"torch.autograd.forward_ad.unpack_dual({name}).primal"
        )


def check_no_tangent(name: str, value: Tensor | None) -> None:
    """What is asked where a row's classes are spread over ranks."""
    if has_tangent(value):
        raise ValueError(
            f"{name} must not carry a forward-mode tangent with a group: the derivative would need the other ranks' "
            "tangents. Take it in one process, without group"
        )


def _on_device(name: str, value: Tensor, of: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of the {of} ({like.device}), got {value.device}")


def _floating(name: str, value: Tensor, backend: str) -> None:
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if backend == "triton" and value.dtype == torch.float64:
        raise TypeError(
            f"{name} must be float16, bfloat16 or float32 with backend='triton', got float64; pass backend='torch'"
        )


def _has_sizes(tensor: Tensor, sizes) -> bool:
    """Whether a tensor has these sizes, as far as they are known; a compiled graph checks the rest when it runs."""
    if tensor.dim() != len(sizes):
        return False
    for size, wanted in zip(tensor.shape, sizes, strict=True):
        if holds(size != wanted):
            return False
        if torch.compiler.is_compiling():
            torch._check(size == wanted)
    return True


def check_logits(logits, backend: str, are_shards: bool) -> None:
    """Dtype, shape and strides of the logits; those of a rank may be of no class."""
    check_tensor("logits", logits)
    _floating("logits", logits, backend)
    if logits.dim() == 0 or not are_shards and holds(logits.shape[-1] == 0):
        raise ValueError(f"logits must be (..., V) with at least one class, got shape {_shape(logits)}")
    if backend != "reference" and not torch.compiler.is_compiling() and not logits.is_contiguous():
        rows_of(logits)  # when compiled, the operator looks at the strides that it gets


def check_writable(logits: Tensor) -> None:
    """What `inplace` asks of the logits."""
    if not torch.compiler.is_compiling() and logits.numel() and not are_disjoint(logits):
        raise ValueError(
            f"inplace must be False for logits whose rows share memory, got strides {list(logits.stride())}"
        )
    owner = logits if logits._base is None else logits._base
    if torch.is_grad_enabled() and owner.is_leaf and owner.requires_grad:
        raise ValueError(
            "inplace must be False for logits that are a leaf that requires grad, such as a parameter, or a view of "
            "one: its values would become its gradient. Pass inplace=False"
        )


def check_head(input, linear_weight, linear_bias, backend: str, are_shards: bool) -> None:
    """Dtypes, shapes and devices of what the logits are made from; the classes of a rank may be none."""
    tensors = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    if linear_bias is None:
        del tensors["linear_bias"]
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        _floating(name, tensor, backend)
    if linear_weight.dim() != 2 or any(holds(size == 0) for size in linear_weight.shape[are_shards:]):
        raise ValueError(
            f"linear_weight must be (V, D) with at least one class and feature, got shape {_shape(linear_weight)}"
            + (
                "; a weight that is sharded must be gathered first, or its ranks given as group"
                if holds(linear_weight.numel() == 0)
                else ""
            )
        )
    V, D = linear_weight.shape
    if input.dim() == 0 or not _has_sizes(input, (*input.shape[:-1], D)):
        raise ValueError(f"input must be (..., D) with D = {D} as in linear_weight, got shape {_shape(input)}")
    if linear_bias is not None and not _has_sizes(linear_bias, (V,)):
        raise ValueError(f"linear_bias must have one entry per class, [{V}], got {_shape(linear_bias)}")
    autocast = is_autocast(input.device.type)
    for name, tensor in tensors.items():
        _on_device(name, tensor, "input", input)
        if tensor.dtype != input.dtype and not (autocast and torch.float64 not in (tensor.dtype, input.dtype)):
            raise TypeError(
                f"{name} must have the dtype of the input ({input.dtype}), got {tensor.dtype}; "
                "convert one of them, or use torch.autocast"
            )


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a device; "meta" has none, and asking would be an error."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def check_rows(target, options, of: str, like: Tensor, V: int | None) -> None:
    """What there is per row or per class, against `like` (..., size), which the caller calls `of`.

    V: the number of classes, None where other ranks have more of them.
    """
    check_plain("target", target)
    if target.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"target must be int32 or int64, got {target.dtype}")
    if not _has_sizes(target, like.shape[:-1]):
        raise ValueError(
            f"target must have the shape of the {of} without the last dimension, {_shape(like)[:-1]}, "
            f"got {_shape(target)}"
        )
    _on_device("target", target, of, like)
    weight, token_weight = options.weight, options.token_weight
    if weight is not None:
        check_plain("weight", weight)
        _on_device("weight", weight, of, like)
        if weight.dim() != 1 or V is not None and not _has_sizes(weight, (V,)):
            raise ValueError(f"weight must have one entry per class, [{'V' if V is None else V}], got {_shape(weight)}")
    if token_weight is not None:
        check_plain("token_weight", token_weight)
        _on_device("token_weight", token_weight, of, like)
        if not _has_sizes(token_weight, target.shape):
            raise ValueError(
                f"token_weight must have the shape of the target, {_shape(target)}, got {_shape(token_weight)}"
            )
    threshold, denominator = getattr(options.rule, "threshold", None), options.denominator
    if isinstance(threshold, Tensor):
        check_plain("threshold", threshold)
        _on_device("threshold", threshold, of, like)
    if isinstance(denominator, Tensor):
        check_plain("denominator", denominator)
        if denominator.device.type != "cpu":
            _on_device("denominator", denominator, of, like)
