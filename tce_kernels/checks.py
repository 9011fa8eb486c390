"""What the arguments of the losses must be. Checks run before anything is computed, and read no tensor's data."""

import math
from numbers import Real

import torch
from torch import Tensor

from .autograd import as_rows

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("auto", "triton", "torch", "reference")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _number(name: str, value, rule: str, accepts) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not accepts(value):
        raise ValueError(f"{name} must be {rule}, got {value}")


def _flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


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


def _constant(name: str, value: Tensor) -> None:
    """A tensor option: floating or integer, and not differentiated."""
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be a tensor of real numbers, got {value.dtype}")
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad: the loss has no gradient for it, so pass {name}.detach()")


def check_threshold(threshold) -> None:
    if isinstance(threshold, Tensor):
        if threshold.dim() != 0:
            raise ValueError(f"threshold must be a number or a 0-d tensor, got shape {_shape(threshold)}")
        if not threshold.is_floating_point():
            raise TypeError(f"threshold must be a floating-point tensor, got {threshold.dtype}")
    else:
        _number("threshold", threshold, "in (0, 1]", lambda value: 0 < value <= 1)


def check_focal(gamma, alpha, label_smoothing: float = 0.0) -> None:
    _number("gamma", gamma, "a finite number >= 0", lambda value: 0 <= value < math.inf)
    _number("alpha", alpha, "a finite number >= 0", lambda value: 0 <= value < math.inf)
    if label_smoothing:
        raise ValueError(f"label_smoothing must be 0 with the focal loss, got {label_smoothing}")


def check_chunks(chunk_size="auto", accumulate_dtype=torch.float32) -> None:
    """The options that only the linear losses have."""
    if chunk_size != "auto":
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
            raise TypeError(f"chunk_size must be 'auto' or an int, got {chunk_size!r}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be 'auto' or at least 1, got {chunk_size}")
    if not isinstance(accumulate_dtype, torch.dtype):
        raise TypeError(f"accumulate_dtype must be a torch.dtype, got {accumulate_dtype!r}")
    if accumulate_dtype not in DTYPES:
        raise ValueError(f"accumulate_dtype must be one of {', '.join(map(str, DTYPES))}, got {accumulate_dtype}")


def check_options(
    *, weight=None, token_weight=None, ignore_index=-100, reduction="mean", denominator="valid", label_smoothing=0.0,
    z_loss=0.0, softcap=None, logit_scale=1.0, inplace=False, allow_retain_graph=False, return_stats=False,
    backend="auto",
) -> None:  # fmt: skip
    """The options by themselves and with one another."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    _choice("reduction", reduction, ("mean", "sum", "none"))
    _choice("backend", backend, BACKENDS)
    for name, flag in [
        ("inplace", inplace), ("allow_retain_graph", allow_retain_graph), ("return_stats", return_stats)
    ]:  # fmt: skip
        _flag(name, flag)

    if isinstance(denominator, str):
        _choice("denominator", denominator, ("valid", "kept"))
    elif isinstance(denominator, Tensor):
        _constant("denominator", denominator)
        if denominator.dim() != 0:
            raise ValueError(f"denominator must be a 0-d tensor, got shape {_shape(denominator)}")
    else:
        _number("denominator", denominator, "a finite number >= 0", lambda value: 0 <= value < math.inf)
    if reduction != "mean" and not (isinstance(denominator, str) and denominator == "valid"):
        raise ValueError(f"denominator must be left at 'valid' with reduction={reduction!r}, got {denominator!r}")

    _number("label_smoothing", label_smoothing, "in [0, 1]", lambda value: 0 <= value <= 1)
    _number("z_loss", z_loss, "a finite number >= 0", lambda value: 0 <= value < math.inf)
    _number("logit_scale", logit_scale, "a finite number > 0", lambda value: 0 < value < math.inf)
    if softcap is not None:
        _number("softcap", softcap, "None or a finite number > 0", lambda value: 0 < value < math.inf)
    for name, tensor in [("weight", weight), ("token_weight", token_weight)]:
        if tensor is not None:
            _tensor(name, tensor)
            _constant(name, tensor)
    if label_smoothing and weight is not None:
        raise ValueError(f"label_smoothing must be 0 with class weights, got {label_smoothing}")
    if inplace and allow_retain_graph:
        raise ValueError("inplace must be False with allow_retain_graph=True, which keeps the logits, got True")


def check_logits(logits, *, inplace, backend) -> None:
    """Dtype, shape and strides of the logits."""
    _tensor("logits", logits)
    _floating("logits", logits, backend)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (..., V) with at least one class, got shape {_shape(logits)}")
    if backend == "reference":
        return
    if as_rows(logits) is None:
        raise ValueError(
            "logits must have contiguous classes (stride 1) and rows that two strides describe, got shape "
            f"{_shape(logits)} with strides {list(logits.stride())}; pass logits.contiguous(), which copies them"
        )
    if inplace and logits.numel() and not _disjoint(logits):
        raise ValueError(
            f"inplace must be False for logits whose rows share memory, got strides {list(logits.stride())}"
        )


def check_head(input, linear_weight, linear_bias, *, backend) -> None:
    """Dtypes, shapes and devices of what the logits are made from."""
    tensors = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    if linear_bias is None:
        del tensors["linear_bias"]
    for name, tensor in tensors.items():
        _tensor(name, tensor)
        _floating(name, tensor, backend)
        if hasattr(tensor, "full_tensor"):
            raise TypeError(f"{name} must be a plain tensor, got a DTensor: pass {name}.full_tensor()")
    if linear_weight.dim() != 2 or 0 in linear_weight.shape:
        raise ValueError(
            f"linear_weight must be (V, D) with at least one class and feature, got shape {_shape(linear_weight)}"
            + ("; a weight that is sharded must be gathered first" if linear_weight.numel() == 0 else "")
        )
    V, D = linear_weight.shape
    if input.dim() == 0 or input.shape[-1] != D:
        raise ValueError(f"input must be (..., D) with D = {D} as in linear_weight, got shape {_shape(input)}")
    if linear_bias is not None and linear_bias.shape != (V,):
        raise ValueError(f"linear_bias must have one entry per class, [{V}], got {_shape(linear_bias)}")
    autocast = torch.is_autocast_enabled(input.device.type)
    for name, tensor in tensors.items():
        _on_device(name, tensor, "input", input)
        if tensor.dtype != input.dtype and not (autocast and torch.float64 not in (tensor.dtype, input.dtype)):
            raise TypeError(
                f"{name} must have the dtype of the input ({input.dtype}), got {tensor.dtype}; "
                "convert one of them, or use torch.autocast"
            )


def check_rows(target, threshold, of: str, like: Tensor, V: int, *, weight, token_weight, denominator) -> None:
    """What there is per row or per class, against `like` (..., size), which the caller calls `of`."""
    _tensor("target", target)
    if target.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"target must be int32 or int64, got {target.dtype}")
    if target.shape != like.shape[:-1]:
        raise ValueError(
            f"target must have the shape of the {of} without the last dimension, {_shape(like)[:-1]}, "
            f"got {_shape(target)}"
        )
    _on_device("target", target, of, like)
    if weight is not None:
        _on_device("weight", weight, of, like)
        if weight.shape != (V,):
            raise ValueError(f"weight must have one entry per class, [{V}], got {_shape(weight)}")
    if token_weight is not None:
        _on_device("token_weight", token_weight, of, like)
        if token_weight.shape != target.shape:
            raise ValueError(
                f"token_weight must have the shape of the target, {_shape(target)}, got {_shape(token_weight)}"
            )
    if isinstance(threshold, Tensor):
        _constant("threshold", threshold)
        _on_device("threshold", threshold, of, like)
    if isinstance(denominator, Tensor) and denominator.device.type != "cpu":
        _on_device("denominator", denominator, of, like)


def _disjoint(logits: Tensor) -> bool:
    """Whether no two rows overlap."""
    *shape, extent = logits.shape
    *strides, _ = logits.stride()
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size > 1):
        if stride < extent:
            return False
        extent = stride * (size - 1) + extent
    return True
