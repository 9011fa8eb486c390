"""Logits that are not multiplied out until somebody reads them.

To everybody `LazyLogits` are a tensor: they have a shape, a dtype and gradients, and whoever asks for their values gets
them. What models do between head and loss (slices, views, casts, factors, a tanh softcap) is written down, so that a
loss can take hidden states, weight, scale and softcap instead.
"""

import contextlib
import functools
import math
import weakref
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils import _pytree

REMEDY = "read the logits before, or have them made at once: truncate(model, lazy_logits=False)"
CHANGED = f"the weight of the lm-head, or its input, has changed since the call (by an optimizer?): {REMEDY}"
TAKEN_AWAY = f"the weight of the lm-head has been taken out of memory since the call: {REMEDY}"
FOLLOWED = "logits were written to after a torch.autograd.Function had read them: pass it logits.clone()"
NO_GRADIENT = "the loss has no gradient with respect to lazy logits: pass truncate(model, lazy_logits=False)"


_STEPS = weakref.WeakKeyDictionary()  # of each head, how often an optimizer has changed it


def _count(optimizer, args, kwargs):
    """Versions do not tell of fused optimizers, of those that write to `data`, and of shards."""
    changed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for head in _STEPS:
        _STEPS[head] += any(id(parameter) in changed for parameter in head.parameters(recurse=False))


register_optimizer_step_post_hook(_count)


class Product:
    """hidden weight^T + bias of one call of a head, not multiplied."""

    def __init__(self, head: "LazyHead", hidden: Tensor):
        self.head, self.tensors = head, (hidden, head.weight, head.bias)
        # What logits are made of: gradients that end here have not gone on to an embedding that is tied to the weight.
        self.aliases = tuple(None if tensor is None else tensor.view_as(tensor) for tensor in self.tensors)
        kind = hidden.device.type
        can_cast = torch.amp.is_autocast_available(kind)  # not so on "meta"
        self.autocast = torch.get_autocast_dtype(kind) if can_cast and torch.is_autocast_enabled(kind) else None
        self._casting = functools.partial(torch.autocast, kind, self.autocast, enabled=self.autocast is not None)
        self._casting = self._casting if can_cast else contextlib.nullcontext
        self.calls = head.loss.calls  # of the loss, before this one
        self.is_used = False  # by a loss
        _STEPS.setdefault(head, 0)
        self._versions = self._now()

    def _now(self) -> list[int]:
        versions = [tensor._version for tensor in self.tensors if tensor is not None and not tensor.is_inference()]
        return [_STEPS[self.head], *versions]

    @contextlib.contextmanager
    def at_hand(self) -> Iterator[None]:
        """Autocast as it was, and the weight whole: FSDP2 takes it away where the head is a unit of its own."""
        if self._now() != self._versions:
            raise RuntimeError(CHANGED)
        _, weight, _ = self.tensors
        is_away = weight.untyped_storage().size() == 0 < weight.numel()
        if is_away:
            if not hasattr(self.head, "unshard"):
                raise RuntimeError(TAKEN_AWAY)
            self.head.unshard()
        try:
            with self._casting():
                yield
        finally:
            if is_away:
                self.head.reshard()


class Recipe:
    """How logits follow from a product: of which rows, and by which steps.

    scale, softcap: what the steps amount to, softcap tanh(scale x / softcap).
    base, view: of views, which share the memory of their base once it has some.
    """

    def __init__(
        self, product, hidden, dtype, steps=(), scale=1.0, softcap=None, base=None, view=None, is_detached=False
    ):
        self.product, self.hidden, self.dtype, self.steps = product, hidden, dtype, steps
        self.scale, self.softcap, self.base, self.view = scale, softcap, base, view
        self.is_detached = is_detached or not torch.is_grad_enabled()
        self.requires_grad = not self.is_detached and any(t is not None and t.requires_grad for t in product.tensors)
        self.made: Tensor | None = None
        self._made_version, self._is_alias = 0, False
        self.is_followed = False  # read, before any change in place, where an autograd Function may have done so

    def but(self, **changes) -> "Recipe":
        """The same with changes, in memory of its own."""
        names = "product", "hidden", "dtype", "steps", "scale", "softcap", "is_detached"
        return Recipe(**{name: getattr(self, name) for name in names} | changes)

    def layout(self) -> Tensor:
        """A tensor without values that lies in memory as these logits would."""
        if self.base is not None:
            return self.view(self.base.layout())
        with torch.inference_mode(False):  # where nothing knows of its base
            return torch.empty((*self.hidden.shape[:-1], len(self.product.tensors[1])), device="meta")

    @property
    def is_apart(self) -> bool:
        """Whether they are a view that has been made for a reader, without the memory that it is a view of."""
        return self.made is not None and self.base is not None and not self._is_alias

    @property
    def is_made(self) -> bool:
        return self.made is not None or self.base is not None and self.base.is_made

    @property
    def is_written(self) -> bool:
        """Whether the logits have been changed in place since they were made."""
        if self.base is not None and self.base.is_made:
            return self.base.is_written
        return self.made is not None and not self.made.is_inference() and self.made._version != self._made_version

    def make(self, to_write: bool = False) -> Tensor:
        """The logits, which stay: what is written to them is there for the next reader."""
        is_whole = self.base is not None and self.hidden.numel() == self.base.hidden.numel()  # nothing less to make
        if self.base is not None and (to_write or is_whole or self.base.is_made):
            made = self.base.make(to_write)
            if not self._is_alias:
                with torch.set_grad_enabled(self.requires_grad):
                    self.made, self._is_alias = self.view(made), True
        elif self.made is None:
            self.made = self.compute()
            self._made_version = 0 if self.made.is_inference() else self.made._version
        return self.made

    def read(self) -> Tensor:
        """The logits, which do not stay if they were not there, for who has come past `__torch_function__`."""
        self.is_followed |= not self.is_written
        if self.base is not None and self.base.is_made and not self._is_alias:
            return self.view(self.base.read())
        return self.compute() if self.made is None else self.made

    def compute(self) -> Tensor:
        """What PyTorch would have made, by the same steps and with the same graph."""
        _, weight, bias = self.product.aliases
        is_inference = self.hidden.is_inference()
        with self.product.at_hand(), torch.inference_mode(is_inference), torch.set_grad_enabled(self.requires_grad):
            return functools.reduce(lambda logits, step: step(logits), self.steps, F.linear(self.hidden, weight, bias))


class _Connected(torch.autograd.Function):
    """Gradients for readers that autograd sees and `__torch_function__` does not."""

    @staticmethod
    def forward(ctx, recipe, hidden, weight, bias):
        ctx.recipe = recipe
        ctx.set_materialize_grads(False)
        return LazyLogits(recipe)

    @staticmethod
    def backward(ctx, grad_logits):
        if grad_logits is None:  # of a Function behind them, whose other outputs have one
            return None, None, None, None
        needs = ctx.needs_input_grad[1:]
        if ctx.recipe.is_written and ctx.recipe.is_followed:
            raise RuntimeError(FOLLOWED)
        with torch.enable_grad():
            # Those that have been made may have no graph any more.
            logits = ctx.recipe.read() if ctx.recipe.is_written else ctx.recipe.compute()
        wanted = [alias for alias, need in zip(ctx.recipe.product.aliases, needs, strict=True) if need]
        with ctx.recipe.product.at_hand():
            is_differentiated = torch.is_grad_enabled()
            grads = torch.autograd.grad(logits, wanted, grad_logits, retain_graph=True, create_graph=is_differentiated)
        grads = iter(grads)
        return None, *(next(grads) if need else None for need in needs)


def _memory(value) -> int | None:
    """Which memory a tensor lies in; None for what has none of that kind."""
    is_in_memory = isinstance(value, Tensor) and value.layout == torch.strided
    return value.untyped_storage()._cdata if is_in_memory else None


class LazyLogits(Tensor):
    """Logits (..., V) whose values are made when somebody reads them."""

    recipe: Recipe

    @staticmethod
    def __new__(cls, recipe):
        like = recipe.layout()
        return Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), like.storage_offset(), dtype=recipe.dtype, device=recipe.hidden.device
        )

    def __init__(self, recipe):
        self.recipe = recipe

    @classmethod
    def of(cls, recipe: Recipe) -> "LazyLogits":
        return _Connected.apply(recipe, *recipe.product.tensors) if recipe.requires_grad else cls(recipe)

    @property
    def is_lazy(self) -> bool:
        """Whether the recipe says all of them: they are not made, and have not come out of an autograd Function.

        DDP puts one behind the model.
        """
        with torch._C.DisableTorchFunctionSubclass():
            return not self.recipe.is_made and self.requires_grad == self.recipe.requires_grad

    def _made(self, by: str, to_write: bool) -> Tensor:
        recipe = self.recipe
        recipe.is_followed |= not torch.is_grad_enabled() and not recipe.is_written
        if not recipe.is_made:
            recipe.product.head.loss.logits_made(recipe, by)
            if not self.is_lazy:
                with torch.inference_mode(False), torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
                    recipe.made, recipe.base = torch.clone(self), None
        return recipe.make(to_write)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], cls) and not args[0].recipe.is_made:
            recipe = args[0].recipe
            of_frameworks = func is Tensor.register_hook and str(args[1].__module__).startswith("torch.")
            if func in _QUESTIONS or of_frameworks:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func in (Tensor.register_hook, Tensor.retain_grad) and recipe.product.is_used:
                raise RuntimeError(NO_GRADIENT)
            # Transforms would have to know of the autograd.Function.
            if func in _WRITTEN_DOWN and args[0].is_lazy and not torch._C._are_functorch_transforms_active():
                recipe.is_followed |= not torch.is_grad_enabled()
                changed = _WRITTEN_DOWN[func](recipe, func, *args[1:], **kwargs)
                if changed is not None:
                    return args[0] if changed is recipe else cls.of(changed)
        name = getattr(func, "__name__", str(func))
        to_write = name in _WRITES or name.endswith("_") and not name.endswith("__") or "out" in kwargs

        def call(to_write):
            made = _pytree.tree_map_only(cls, lambda logits: logits._made(name, to_write), (args, kwargs))
            return func(*made[0], **made[1])

        result = call(to_write)
        recipes = [leaf.recipe for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        apart = {_memory(recipe.made) for recipe in recipes if recipe.is_apart}
        # What looks into the memory of a view may be written to later, and has to be a view of its base.
        return call(True) if apart and apart & {*map(_memory, _pytree.tree_leaves(result))} else result

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Of readers below `__torch_function__`. Autograd has recorded the call; what is made here has no graph."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(_detached(args[0].recipe, torch.detach))
        if func._schema.is_mutable and any(isinstance(arg, cls) for arg in args):
            raise RuntimeError(f"{func} must not write to lazy logits: pass logits.clone()")
        args, kwargs = _pytree.tree_map_only(cls, lambda logits: logits.recipe.read(), (args, kwargs or {}))
        return func(*args, **kwargs)


class LazyHead(nn.Linear):
    """An nn.Linear that leaves its product to whoever reads it; a module becomes one by its `__class__`.

    So no parameter, buffer, hook or name changes, and copies use their own weight.
    """

    loss = None  # told of logits that are made; without it nothing is lazy

    def forward(self, input: Tensor) -> Tensor:
        is_one_row = not torch.is_grad_enabled() and input.dim() > 2 and input.shape[-2] == 1  # as in generation
        if self.loss is None or is_one_row or not _is_plain(input, self.weight, self.bias):
            return super().forward(input)
        product = Product(self, input)
        return LazyLogits.of(Recipe(product, product.aliases[0], product.autocast or input.dtype))


def _is_plain(*tensors: Tensor | None) -> bool:
    """Not what compilers and transforms follow, DTensors, quantised weights, what DeepSpeed's ZeRO-3 takes away."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return all(
        tensor is None
        or type(tensor) in (Tensor, nn.Parameter)
        and not hasattr(tensor, "ds_id")
        and forward_ad.unpack_dual(tensor).tangent is None
        for tensor in tensors
    )


# What is written down, f(recipe, func, *other arguments) -> another recipe, or None where only values would do.


def _call(func, args, kwargs, logits):
    return func(logits, *args, **kwargs)


def _viewed(recipe, func, *args, **kwargs):
    hidden, (n_classes, n_features) = recipe.hidden, recipe.product.tensors[1].shape
    if func is Tensor.__getitem__ and type(args[0]) is Tensor:
        return _selected(recipe, *args)
    if any(isinstance(arg, (Tensor, torch.dtype)) for arg in _pytree.tree_leaves((args, kwargs))) or n_classes < 2:
        return None
    with torch.inference_mode(False):  # where nothing knows of its base
        logits = recipe.layout()
        seen = func(logits, *args, **kwargs)
    is_copy = seen._base is None and seen is not logits
    if is_copy and func not in _RESHAPES or seen.shape[-1:] != (n_classes,) or seen.stride(-1) != 1:
        return None
    if any(step % n_classes for step in (seen.storage_offset(), *seen.stride()[:-1])):  # not between whole rows
        return None
    if seen.shape != logits.shape:
        is_shape = func in _RESHAPES or func is Tensor.view
        hidden = hidden.reshape(*seen.shape[:-1], n_features) if is_shape else func(hidden, *args, **kwargs)
    if hidden.shape != (*seen.shape[:-1], n_features):
        return None  # a slice of all classes has cut the hidden states
    of_base = {} if is_copy else {"base": recipe, "view": functools.partial(_call, func, args, kwargs)}
    return recipe.but(hidden=hidden, **of_base)


def _selected(recipe, index):
    """Rows picked by a mask or by numbers."""
    n_row_dims = index.dim() if index.dtype == torch.bool else 1
    if index.dtype == torch.uint8 or not 0 < n_row_dims < recipe.hidden.dim():
        return None
    return recipe.but(hidden=recipe.hidden[index])


def _scaled(recipe, func, number, **kwargs):
    if kwargs or not isinstance(number, (int, float)) or isinstance(number, bool) or not 0 < number < math.inf:
        return None
    factor = 1 / number if func in _DIVISIONS else number
    softcap = None if recipe.softcap is None else recipe.softcap * factor
    step = functools.partial(_call, func, (number,), {})
    return recipe.but(scale=recipe.scale * factor, softcap=softcap, steps=(*recipe.steps, step))


def _capped(recipe, func):
    return recipe.but(softcap=1.0, steps=(*recipe.steps, func)) if recipe.softcap is None else None


def _cast(recipe, func, *args, **kwargs):
    given = [*args, *kwargs.values(), _CASTS.get(func)]
    dtype = next((value for value in given if isinstance(value, torch.dtype)), recipe.dtype)
    devices = {torch.device(value) for value in given if isinstance(value, (str, torch.device))}
    is_of_tensors = any(isinstance(value, Tensor) for value in given)
    if not dtype.is_floating_point or devices - {recipe.hidden.device} or is_of_tensors:
        return None
    if dtype == recipe.dtype and True not in given:  # nor a copy
        return recipe
    return recipe.but(dtype=dtype, steps=(*recipe.steps, functools.partial(_call, func, args, kwargs)))


def _copied(recipe, func, **kwargs):
    return recipe if func is Tensor.contiguous and recipe.layout().is_contiguous() else recipe.but()


def _detached(recipe, func):
    return recipe.but(is_detached=True, base=recipe, view=func)


_DIVISIONS = {getattr(owner, name) for owner in (Tensor, torch) for name in ("div", "divide", "true_divide")}
_DIVISIONS |= {Tensor.__truediv__}
_CASTS = {
    Tensor.float: torch.float32, Tensor.double: torch.float64, Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16, Tensor.to: None,
}  # fmt: skip
_RESHAPES = {Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten}  # which copy where there is no view
_WRITTEN_DOWN = {
    func: written_down
    for written_down, funcs in {
        _scaled: {*_DIVISIONS, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul},
        _capped: {Tensor.tanh, torch.tanh, F.tanh},
        _cast: set(_CASTS),
        _copied: {Tensor.clone, torch.clone, Tensor.contiguous},
        _detached: {Tensor.detach, torch.detach},
        _viewed: {
            Tensor.__getitem__, Tensor.view, *_RESHAPES, Tensor.squeeze, torch.squeeze, Tensor.unsqueeze,
            torch.unsqueeze, Tensor.narrow, torch.narrow,
        },
    }.items()
    for func in funcs
}  # fmt: skip
_WRITES = {
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__", "__set__",
    # Or hand out memory that anybody may write to.
    "numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage",
}  # fmt: skip
_OF_VALUES = {"T", "mT", "H", "mH", "real", "imag", "data", "__cuda_array_interface__"}
_QUESTIONS = {  # about the tensor, not about its values
    attribute.__get__
    for name in set(dir(Tensor)) - _OF_VALUES
    if type(attribute := getattr(Tensor, name)).__name__ in ("getset_descriptor", "property")
} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.stride, Tensor.storage_offset,
    Tensor.is_contiguous, Tensor.get_device, Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex,
    torch.is_complex, Tensor.ndimension, torch.numel, Tensor.__len__, Tensor.__hash__, Tensor.is_inference,
    torch.is_inference,
}  # fmt: skip
