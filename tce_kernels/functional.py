"""The public losses: documentation, checks, the choice of backend and path, reduction."""

import functools
import inspect
import json
import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import autograd, checks, dtensors, linear, reference, stats
from .context import has_tangent, is_plain
from .fsdp import warn_of_full_tensor
from .head import matmul_dtype
from .options import Focal, LinearOptions, LogitsOptions, Truncated
from .ranks import agree, all_or_none, are_compared, sum_over_ranks
from .stats import LossStats
from .torch_ops import compute_dtype


def logits_loss(logits: Tensor, target: Tensor, options: LogitsOptions) -> Tensor | tuple[Tensor, LossStats]:
    """The loss of given logits, whichever it is."""
    if dtensors.any_of(logits):
        return _with_local_tensors(_logits_loss, dtensors.of_logits(logits, target, options))
    return _logits_loss(logits, target, options)


def _with_local_tensors(loss, call):
    return call.result(loss(*call.tensors, call.options, call.row_groups, call.is_summed))


def _logits_loss(logits, target, options, row_groups=(), is_summed=True):
    """Of tensors that are no DTensors; `row_groups` and `is_summed` as in `dtensors.Call`."""
    backend = _chosen(options.backend, logits)
    all_or_none(options.group, [logits, target], False, _check_logits_loss, logits, target, options, backend)
    if backend == "reference":
        loss = getattr(reference, f"{options.rule.name}_cross_entropy")
        return loss(logits, target, **options.of_reference())

    # float16 gradients of a mean would underflow before a gradient scaler gets to multiply them, so their rounding
    # waits for backward and the upstream gradient. So does what is divided by a sum known only after all rows.
    late = options.allow_retain_graph or logits.dtype == torch.float16 or options.by_kept
    in_forward = options.reduction != "none" and not late
    sizes = _agreed(logits, None, target, options, logits.dtype, backend)

    def path(target, row_scale, param, sizes):
        return autograd.loss_and_rows(
            logits, target, row_scale, param, *options.form().plain(), backend, sizes, options.group_name,
            options.entropy, in_forward=in_forward, inplace=options.inplace,
        )  # fmt: skip

    return _reduced(path, target, sizes, logits.dtype, options, options.by_kept, row_groups, is_summed)


def _check_logits_loss(logits, target, options, backend):
    are_shards = options.group_name is not None
    checks.check_logits(logits, backend, are_shards)
    checks.check_rows(target, options, "logits", logits, None if are_shards else logits.shape[-1])
    if are_shards:
        checks.check_no_tangent("logits", logits)
    if options.inplace and backend != "reference":
        checks.check_writable(logits)


def linear_loss(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, options: LinearOptions
) -> Tensor | tuple[Tensor, LossStats]:
    """The loss of logits that are made here, whichever it is."""
    if dtensors.any_of(input, linear_weight, linear_bias):
        call = dtensors.of_head(input, linear_weight, linear_bias, target, options)
        return _with_local_tensors(_linear_loss, call)
    return _linear_loss(input, linear_weight, linear_bias, target, options)


def _linear_loss(input, linear_weight, linear_bias, target, options, row_groups=(), is_summed=True):
    backend = _chosen(options.backend, input)
    head = input, linear_weight, linear_bias
    all_or_none(options.group, [*head, target], True, _check_linear_loss, *head, target, options, backend)
    if backend == "reference":
        loss = getattr(reference, f"linear_{options.rule.name}_cross_entropy")
        return loss(input, linear_weight, target, linear_bias=linear_bias, **options.of_reference())
    if any(map(has_tangent, head)):  # forward mode: of all logits at once
        of_logits = {name: getattr(options, name) for name in LogitsOptions.__dataclass_fields__ if name != "inplace"}
        return logits_loss(torch.nn.functional.linear(*head), target, LogitsOptions(**of_logits))

    dtype = matmul_dtype(input)
    needs = [tensor is not None and torch.is_grad_enabled() and tensor.requires_grad for tensor in head]
    sizes = _agreed(input, linear_weight, target, options, dtype, backend, linear_bias is not None, needs)

    def path(target, row_scale, param, sizes):
        return linear.loss_and_rows(
            *head, target, row_scale, param, *options.form().plain(), *options.chunks(), dtype, backend, needs,
            options.rows_spread, sizes, options.group_name, options.entropy,
            in_forward=options.reduction != "none" and not options.allow_retain_graph, may_vanish=options.by_kept,
        )  # fmt: skip

    # Divided last, float16 gradients do not underflow on the way: the division meets their sums over rows.
    divide_last = options.by_kept or dtype == torch.float16
    return _reduced(path, target, sizes, dtype, options, divide_last, row_groups, is_summed)


def _check_linear_loss(input, linear_weight, linear_bias, target, options, backend):
    are_shards = options.group_name is not None
    if options.rows == "sharded" and options.group is None:
        raise ValueError(
            "rows must be left at 'replicated' where linear_weight has all classes, got 'sharded' without a group: "
            "pass the group, or FSDP2's own shard, which stays one if the head is a unit of its own (fully_shard(head))"
        )
    checks.check_head(input, linear_weight, linear_bias, backend, are_shards)
    if not torch.compiler.is_compiling() and linear_weight.grad_fn is not None:
        warn_of_full_tensor(linear_weight)
    checks.check_rows(target, options, "input", input, None if are_shards else len(linear_weight))
    if are_shards:
        for name, tensor in (("input", input), ("linear_weight", linear_weight), ("linear_bias", linear_bias)):
            checks.check_no_tangent(name, tensor)


def _chosen(backend: str, tensor) -> str:
    if backend == "auto":
        return "triton" if isinstance(tensor, Tensor) and tensor.is_cuda else "torch"
    return backend


def _agreed(input, linear_weight, target, options, dtype, backend, has_bias=False, needs=()) -> Tensor | None:
    """Numbers of classes and of rows of each rank, once the ranks have found that their arguments go together."""
    if options.group_name is None:
        return None
    text = ""
    if not torch.compiler.is_compiling():
        facts = {"dtype": str(dtype), "backend": backend, "linear_bias": has_bias}
        names = ("input", "linear_weight", "linear_bias") if needs else ()
        facts |= {f"requires_grad of {name}": need for name, need in zip(names, needs, strict=True)}
        text = json.dumps({**options.of_ranks(), **facts})
    tensors = [value if isinstance(value, Tensor) else None for value in options.checked_by_ranks()]
    on_host = are_compared([input], always=linear_weight is not None)
    # An operator without a derivative must not see what functional transforms differentiate.
    head = [None if tensor is None else tensor.detach() for tensor in (input, linear_weight)]
    return agree(*head, target, *tensors, text, options.rows_spread, on_host, options.group_name)


def _reduced(path, target, sizes, dtype, options, divide_last, row_groups, is_summed):
    """What the paths share: one number per row each before, the reduction after.

    path(target, row_scale, param, sizes) returns the loss, per row or summed up, `rows`, and class_fraction if it
    knows one.
    """
    dtype = compute_dtype(dtype)
    target = target.long()  # int32 would take an ignore_index beyond its range for another number
    row_scale = row_weight(target, options, dtype)
    if sizes is not None and not sizes.is_cpu and options.weight is not None:  # the host cannot know that they fit
        row_scale = torch.where(sizes[0].sum() == len(options.weight), row_scale, math.nan)
    summed = [options.group_name] if options.rows_spread else []
    spread = [*summed, *row_groups]
    if is_summed:
        summed = spread
    mean = options.reduction == "mean"
    if mean and not options.by_kept:
        if isinstance(options.denominator, str):
            total, sizes = sum_over_ranks(row_scale.sum(), sizes, spread)
        else:
            total = _scalar(options.denominator, row_scale)
        if divide_last:
            row_scale = row_scale * (total != 0)  # a product, since `total` may be on the CPU
        elif isinstance(options.denominator, str) and not options.is_weighted:
            row_scale = row_scale / total.clamp(min=1)  # a count: where it is 0, so are the rows
        else:
            row_scale = row_scale * torch.where(total == 0, total, total.reciprocal())  # a number is a launch more

    loss, rows, *class_fraction = path(target, row_scale, options.rule.param(dtype, target.device), sizes)

    rows = rows.detach()
    if options.reduction != "none":
        loss, sizes = sum_over_ranks(loss.sum() if loss.dim() else loss, sizes, summed)
    if options.by_kept:
        total, _ = sum_over_ranks((row_scale * (rows[stats.COEF] != 0)).sum(), sizes, spread)
    if mean and divide_last:
        is_zero = total == 0
        if options.by_kept:
            loss = torch.where(is_zero, total, loss)  # 0 * infinity
        loss = loss / (total + is_zero)
    if not options.return_stats:
        return loss
    class_fraction = class_fraction or [torch.ones((), dtype=torch.float32, device=loss.device)]
    return loss, stats.from_rows(rows, target != options.ignore_index, *class_fraction)


def row_weight(target, options, dtype):
    """The weight of each row, 0 for those that are ignored."""
    if not options.is_weighted:
        if is_plain(target):  # one kernel, where a comparison and a conversion would be two
            return torch.ne(target, options.ignore_index, out=torch.empty_like(target, dtype=dtype))
        return (target != options.ignore_index).to(dtype)
    weight, token_weight = options.weight, options.token_weight
    of_row = None if weight is None else weight.to(dtype)[target.clamp(0, len(weight) - 1)]
    if token_weight is not None:
        token_weight = token_weight.to(dtype)
        of_row = token_weight if of_row is None else of_row * token_weight
    return torch.where(target != options.ignore_index, of_row, 0)


def _scalar(number: float | Tensor, like: Tensor) -> Tensor:
    """A tensor [] in the dtype of another; on the CPU it costs no launch, and need not be waited for."""
    if isinstance(number, Tensor):
        return number.to(like.dtype)
    device = like.device if torch.compiler.is_compiling() else "cpu"
    return torch.full((), number, dtype=like.dtype, device=device)


# Of options that can be told apart by their values, and do not change.
_VALUES = {float, int, bool, str, type(None), torch.dtype}


def _public(loss: Callable, options_type: type, rule_type: type) -> Callable:
    """Turn a documented signature into the function that it describes.

    The arguments that are options, and those that say which loss it is, go to `loss` as one object; tensors by name.
    Options that were checked before are not checked again, which would take a tenth of a call.
    """

    def decorate(signature):
        parameters = inspect.signature(signature).parameters.values()
        positional = [parameter.name for parameter in parameters if parameter.kind != parameter.KEYWORD_ONLY]
        defaults = {parameter.name: parameter.default for parameter in parameters}
        of_rule = tuple(rule_type.__dataclass_fields__)
        tensors = tuple(name for name in inspect.signature(loss).parameters if name != "options")
        names = [name for name in defaults if name not in tensors]

        def options_of(*values):
            given = dict(zip(names, values, strict=True))
            rule = rule_type(*[given.pop(name) for name in of_rule])
            return options_type(rule=rule, **given)

        remembered = functools.lru_cache(typed=True)(options_of)

        def opened(arguments, keywords):
            signature(*arguments, **keywords)  # Python's own error where they do not fit
            given = {**defaults, **dict(zip(positional[: len(arguments)], arguments, strict=True)), **keywords}
            given_tensors = [given.pop(name) for name in tensors]
            known = not torch.compiler.is_compiling() and _VALUES.issuperset(map(type, given.values()))
            return given_tensors, (remembered if known else options_of)(*given.values())

        @functools.wraps(signature)
        def public(*arguments, **keywords):
            group = keywords.get("group")
            values = () if group is None else (*arguments, *keywords.values())
            given_tensors, options = all_or_none(group, values, loss is linear_loss, opened, arguments, keywords)
            return loss(*given_tensors, options)

        return public

    return decorate


@_public(logits_loss, LogitsOptions, Truncated)
def truncated_cross_entropy(
    logits: Tensor,
    target: Tensor,
    threshold: float | Tensor = 0.9,
    *,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: str | float | Tensor = "valid",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
    allow_retain_graph: bool = False,
    return_stats: bool | str = False,
    backend: str = "auto",
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """Cross-entropy that drops the tokens whose target the model already predicts with confidence.

        loss[n] = -log p[n]  if p[n] <= threshold  else  0,        p[n] = softmax(z[n])[target[n]]
        z = logit_scale * logits, then softcap * tanh(z / softcap) if softcap is given

    A dropped row (truncated, ignored or of zero weight) adds exactly 0 to the loss and has a gradient of exact zeros.
    The comparison is made in float32 whatever the dtype of the logits; the mask carries no gradient.

    Args:
        logits: (..., V) float16, bfloat16, float32 (or float64, not on Triton). Classes contiguous; rows may be
            strided, as logits[:, :-1] is.
        target: (...) int32 or int64, in [0, V) or `ignore_index`. A bad target is an IndexError on a CPU; on a GPU,
            where looking would synchronise, its row's loss and gradient are NaN.
        threshold: in (0, 1]; 1 is plain cross-entropy. Or a 0-d tensor on the device of the logits, whose range is
            not checked.
        weight: (V,) one weight per class, or None for ones.
        token_weight: (...) one weight per token, or None for ones.
        ignore_index: rows with this target are left out, and not even read.
        reduction: "mean", "sum", or "none" for one loss per token.
        denominator: what "mean" divides by. "valid": the rows that are not ignored, truncated ones included, as in the
            paper; "kept": the rows that are left; with weights, the sum of the weights of those rows. Or a number or
            0-d tensor, such as the token count of an accumulated batch. A denominator of 0 gives a loss of 0.
        label_smoothing: in [0, 1], for the rows that are kept. Not together with `weight`.
        z_loss: adds z_loss * logsumexp(z)^2 to the rows that are kept.
        softcap: soft limit of the logits, or None.
        logit_scale: factor of the logits, the inverse of a temperature.
        inplace: backward's gradient takes the memory of the logits, whose values are then lost: during the forward
            call where the gradient is made there, otherwise in backward. Not for a leaf that requires grad or a view
            of one. No effect where nothing requires grad, on the reference, and where the write would go unnoticed:
            compiled, in functional transforms and forward mode, under dispatch modes (selective checkpointing).
        allow_retain_graph: keep the logits and recompute the gradient at each backward. Without it, a second backward
            through a mean or sum raises an error.
        return_stats: True: also return `LossStats`, from the same pass. "entropy": with the entropy of softmax(z) for
            each row that is not ignored, whatever the loss makes of it; a few more instructions per logit.
        backend: "triton", "torch" or "reference", which never fall back, or "auto": triton for logits on a GPU,
            torch otherwise. Second derivatives need "reference".
        group: the ranks among which the classes are spread, in their order; None for one process. The logits are then
            (..., V_r), this rank's classes, of which it may have any number and none; everything else is as for all V
            classes, and the same on all ranks: target holds ids of all classes, weight is (V,). Loss and statistics
            are the same bits on all ranks, and each has the gradient of its own logits, made in backward without
            communication. Before the work the ranks compare their arguments, and all of them raise if those do not go
            together (compiled: sizes and tensors only); on a GPU, where the host would have to wait for that, only if
            TORCH_DISTRIBUTED_DEBUG is set.
            Call it on all ranks of the group. Not with backend="reference" or forward mode. Logits that are a DTensor
            need no group: Shard(-1) on one mesh dimension, Shard of rows or Replicate on the others. The target is then
            a DTensor or what belongs to this rank's rows, the loss a DTensor, Partial("sum") where rows are sharded;
            "mean" is over the rows of the whole mesh. `inplace` has no effect there.

    Returns:
        float32 (float64 for float64 logits): a scalar, or (...) with reduction="none"; with return_stats
        (loss, LossStats). The gradient has the dtype of the logits and is rounded once; for a bfloat16 mean or sum
        whose upstream gradient is not a power of 2, twice.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range, or does not go with
            another one. IndexError: a bad target on a CPU. RuntimeError: the backend cannot run on this device; a
            second or a double backward (raised by backward). ImportError: triton was asked for and is not installed.

    Source: the truncated cross-entropy of ForTIFAI, arXiv:2509.08972, section 2.3.
    """


@_public(logits_loss, LogitsOptions, Focal)
def focal_cross_entropy(
    logits: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    *,
    alpha: float = 1.0,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: str | float | Tensor = "valid",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
    allow_retain_graph: bool = False,
    return_stats: bool | str = False,
    backend: str = "auto",
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """Focal loss on classes: cross-entropy weighed down where the model is confident.

        loss[n] = -alpha (1 - p[n])^gamma log p[n],        p[n] = softmax(z[n])[target[n]]

    The factor is differentiated too. Gradients are finite at p = 1 for every gamma; a row is dropped where it is 0.

    Args:
        gamma: exponent, a finite number >= 0; 0 is alpha times cross-entropy.
        alpha: factor, a finite number >= 0.
        label_smoothing: must be 0: smoothing a focal loss has no agreed meaning.
        The others, and what is returned and raised: as in `truncated_cross_entropy`.

    Source: Lin et al. 2017, arXiv:1708.02002, equation 5; as compared with in arXiv:2509.08972, appendix A.
    """


@_public(linear_loss, LinearOptions, Truncated)
def linear_truncated_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    threshold: float | Tensor = 0.9,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: str | float | Tensor = "valid",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    allow_retain_graph: bool = False,
    return_stats: bool | str = False,
    backend: str = "auto",
    group: "torch.distributed.ProcessGroup | None" = None,
    chunk_size: int | str = "auto",
    accumulate_dtype: torch.dtype = torch.float32,
    gradient_tolerance: float = 0.0,
    rows: str = "replicated",
) -> Tensor | tuple[Tensor, LossStats]:
    """`truncated_cross_entropy` of the logits input linear_weight^T + linear_bias, which are never all in memory.

    Rows that are dropped take no part in the two matmuls of the gradients, and ignored rows in none: with a share `a`
    kept, 2 N D V (1 + 2 a) floating-point operations instead of 6 N D V. Under torch.no_grad, or where nothing
    requires grad, 2 N D V and no memory for gradients: evaluation without logits.

    Args:
        input: (..., D) float16, bfloat16, float32 (or float64, not on Triton).
        linear_weight: (V, D), the dtype of the input. Under torch.autocast the dtypes may differ: the matmuls are in
            autocast's dtype, each gradient in the dtype of its tensor.
        target: (...) int32 or int64, in [0, V) or `ignore_index`. A bad target is an IndexError on a CPU; on a GPU its
            loss is NaN, and so is the gradient of the whole weight, which sums over the rows.
        linear_bias: (V,), the dtype of the input, or None.
        chunk_size: how many rows have their logits in memory at a time. "auto" splits them evenly: on a CPU into
            multiples of 64 rows, of at most 1024; elsewhere of 1024, of at most 4096 rows or 2^30 bytes of logits,
            whichever is more. Peak memory beyond inputs and gradients is that of 1.5 chunk_size V logits, on a CPU
            of 1.25 and up to 24 MiB. Chunks change the order of sums, nothing else.
        accumulate_dtype: of the sums over rows in the gradients of weight and bias, which are rounded once, at the end;
            never narrower than the matmuls. The sums stay in it inside the matmul where torch and the device can
            (addmm with out_dtype). Where they cannot, as on a CPU, a 16-bit matmul rounds its product for each chunk.
            The sum over the classes in the gradient of the input stays inside its matmul, whose parts cuBLAS may round
            to 16 bits unless torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction (or fp16) is False.
        gradient_tolerance: in [0, 1), the largest share of a chunk's absolute gradient mass (the sum of |dlogits| over
            the rows whose gradients are made together) whose classes may be left out of the two matmuls of the
            gradients. They stand in as the product of their marginals, so that the sums of dlogits over rows and over
            classes, and with them the gradient of the bias, stay exact to rounding; so do loss and statistics. 0, the
            default, leaves nothing out. Not exact: on hidden states of SmolLM2-135M the relative errors in norm were
            5.5e-4 (input) and 1.8e-4 (weight) at 0.001, 1.6e-3 and 5.7e-4 at 0.003, 4.9e-3 and 2.3e-3 at 0.01. Targets
            always take part, and all classes where more than 70% would, as with a model that is not trained yet, or
            with both label_smoothing and softcap. Where an error is acceptable, take 0.003: a small model trained with
            it as well as with 0, on rare tokens too, of which 0.01 cost it a tenth of a nat. `return_stats` tells the
            share that took part, `class_fraction`.
            Takes memory for the weight's rows of those classes, in the dtypes of the matmuls and of the sums.
            backend="reference" and forward mode compute the exact gradient whatever it is. With a group each rank
            leaves out that share of its own part at most.
        group: the ranks among which the classes are spread, in their order; None for one process. The weight is then
            (V_r, D) and the bias (V_r,), of this rank's classes, of which it may have any number and none; target holds
            ids of all V classes, class weights are (V,). The sums of each chunk are gathered while the next one is
            multiplied, so three chunks have their logits in memory, and there are at least four where rows are many.
            The ranks always compare their arguments before the work (compiled: sizes and tensors only): either all
            raise or none does. Call it on all ranks.
        rows: with a group, "replicated": input, target and token_weight are the same on all ranks, and the gradient of
            the input is the sum over them, of which only kept rows travel, in accumulate_dtype. "sharded": each rank
            has rows of its own, any number, of those that FSDP2 or sequence parallelism has given it. Rows that are not
            ignored travel to the other ranks, and gradients of kept rows back; a mean or sum is over the rows of all
            ranks, and its gradients, too, are those of the whole. Losses per row and statistics are of the rank's own.
            A linear_weight (and linear_bias) that is a DTensor, Shard(0) on one mesh dimension and Replicate on the
            others, needs no group. With a plain input `rows` says what its rows are on that dimension, on the others
            they are the rank's own; loss and statistics are plain. So FSDP2's own shard is passed as it is, with
            "sharded": it is not gathered, and its gradient is a sum over ranks, as FSDP2's must then be for the rest
            (`set_gradient_divide_factor(1.0)`; a warning says if it is not). An input that is a DTensor says by its
            placements what its rows are, Shard or Replicate (Partial and Shard(-1) are redistributed to it), and the
            loss is a DTensor, Partial("sum") where rows are sharded on other dimensions. Gradients come back in the
            placements of their tensors. Other placements are a TypeError.
        allow_retain_graph: make the logits of the kept rows again at each backward, as reduction="none" does, instead
            of the gradients during the forward call. Not needed for retain_graph=True.
        threshold and the other options: as in `truncated_cross_entropy`.

    Returns:
        float32 (float64 for float64 input): a scalar, or (...) with reduction="none"; with return_stats
        (loss, LossStats).

    Raises:
        As `truncated_cross_entropy`.

    On a GPU the host waits once before the first chunk and once in each, to learn how many rows are left (over ranks
    with a tolerance twice), and once for what ranks compare. Forward mode has all logits in memory.

    Source: equation 3 of arXiv:2509.08972; the order of the matmuls is this package's own.
    """


@_public(linear_loss, LinearOptions, Focal)
def linear_focal_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    *,
    alpha: float = 1.0,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: str | float | Tensor = "valid",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    allow_retain_graph: bool = False,
    return_stats: bool | str = False,
    backend: str = "auto",
    group: "torch.distributed.ProcessGroup | None" = None,
    chunk_size: int | str = "auto",
    accumulate_dtype: torch.dtype = torch.float32,
    gradient_tolerance: float = 0.0,
    rows: str = "replicated",
) -> Tensor | tuple[Tensor, LossStats]:
    """`focal_cross_entropy` of the logits input linear_weight^T + linear_bias, which are never all in memory.

    Args:
        gamma, alpha, label_smoothing: as in `focal_cross_entropy`.
        The others, and what is returned and raised: as in `linear_truncated_cross_entropy`.

    Source: Lin et al. 2017, arXiv:1708.02002, equation 5.
    """
