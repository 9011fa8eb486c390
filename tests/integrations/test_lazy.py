"""Lazy logits are the logits to whoever looks at them: values, gradients, aliasing, at any level of PyTorch."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tce_kernels.integrations.lazy import LazyHead, LazyLogits, Recipe

B, T, D, V = 2, 5, 4, 7


class Loss:
    """What a head tells of logits that are made."""

    def __init__(self):
        self.calls, self.made_by = 0, []

    def logits_made(self, recipe, by):
        self.made_by.append(by)


@pytest.fixture
def computed(monkeypatch):
    compute, seen = Recipe.compute, []
    monkeypatch.setattr(Recipe, "compute", lambda recipe: seen.append(recipe) or compute(recipe))
    return seen


class Tied(nn.Module):
    """A head whose weight is upstream as well, as with tied embeddings."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(D, V, bias=bias)

    def forward(self, tokens):
        return self.head(torch.tanh(self.head.weight[tokens]))


def stock_and_lazy(bias=True):
    stock = Tied(bias).double()
    lazy = copy.deepcopy(stock)
    lazy.head.__class__, lazy.head.loss = LazyHead, Loss()
    return stock, lazy


TOKENS = torch.tensor([[0, 3, 6, 2, 1], [5, 5, 0, 4, 6]])
MASK = TOKENS > 2
ENTRIES = torch.arange(B * T * V).view(B, T, V) % 3 == 0


def compared(f, **how):
    """f of the logits and its gradients, against the stock head's; how often logits were made."""
    found = []
    for model in stock_and_lazy(**how):
        value = f(model(TOKENS))
        (value * torch.linspace(0.5, 2, value.numel(), dtype=value.dtype).view(value.shape)).sum().backward()
        found.append([value.detach() + 0, *(parameter.grad for parameter in model.parameters())])
    for want, got in zip(*found, strict=True):
        assert want.dtype == got.dtype and want.shape == got.shape
        torch.testing.assert_close(got, want)


class Square(torch.autograd.Function):
    """A reader that autograd sees, and `__torch_function__` does not."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits * logits

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        return 2 * grad * logits


class Triple(torch.autograd.Function):
    """A reader that keeps nothing, so that no version tells it of changes."""

    @staticmethod
    def forward(ctx, logits):
        return logits * 3

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def below(logits):
    """A reader in C++, which autograd follows by itself."""
    with torch._C.DisableTorchFunctionSubclass():
        return logits * 3


WRITTEN_DOWN = {
    "itself": lambda z: z,
    "a slice": lambda z: z[:, :-1],
    "a step": lambda z: z[:, ::2],
    "one": lambda z: z[:, -1],
    "all classes": lambda z: z[:, 1:, :V][..., -V:],
    "one of each": lambda z: z[0, 2],
    "the dots": lambda z: z[..., 1:, :],
    "the dots first": lambda z: z[..., :],
    "a new dimension": lambda z: z[:, None, 1:],
    "a mask": lambda z: z[MASK],
    "numbers": lambda z: z[torch.tensor([1, 1, 0])],
    "view": lambda z: z.view(-1, V),
    "view without classes": lambda z: z.view(B * T, -1),
    "reshape": lambda z: z[:, 1:].reshape(-1, V),
    "reshape of a tuple": lambda z: torch.reshape(z, (T, B, V)),
    "flatten": lambda z: z.flatten(0, 1),
    "flatten from the end": lambda z: z.flatten(end_dim=-2),
    "unsqueeze": lambda z: z.unsqueeze(0).squeeze(0),
    "contiguous": lambda z: z[:, 1:].contiguous().view(-1, V),
    "float": lambda z: z.float(),
    "to": lambda z: z.to(torch.bfloat16).to(dtype=torch.float32, copy=True),
    "to the device": lambda z: z.to("cpu"),
    "a factor": lambda z: 2.5 * z * 3,
    "a divisor": lambda z: torch.div(z / 2, 3),
    "a softcap": lambda z: torch.tanh(z / 3.0) * 3.0,
    "a scaled softcap": lambda z: 2 * (3 * (z * 0.5).tanh()),
    "all": lambda z: ((z[:, 1:].contiguous().float() / 4).tanh() * 5).view(-1, V)[2:],
}
MADE = {
    "some classes": lambda z: z[..., :3],
    "one class": lambda z: z[:, :, 2],
    "classes by number": lambda z: z[..., torch.tensor([0, 6])],
    "a mask and classes": lambda z: z[MASK, 1:3],
    "a mask of all": lambda z: z[z > 0],
    "a mask of entries": lambda z: z[ENTRIES],
    "a mask of rows, and all classes": lambda z: z[MASK, :],
    "a truth": lambda z: z[torch.tensor(True)],
    "classes of one row": lambda z: z[0, 2][torch.tensor([1, 3])],
    "rows and classes": lambda z: z[torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5])],
    "two lists": lambda z: z[[1, 0], [2, 1]],
    "a list": lambda z: z[[1, 0]],
    "the last dimension": lambda z: z[..., None],
    "a view across": lambda z: z.view(B, T * V),
    "flatten all": lambda z: z.flatten(),
    "transpose": lambda z: z.transpose(1, 2),
    "T": lambda z: z[0].T,
    "a negative factor": lambda z: z * -2,
    "a factor of tensors": lambda z: z * torch.tensor(2.0, dtype=z.dtype),
    "integers": lambda z: z.to(torch.int64).to(z.dtype) + z,
    "bits": lambda z: z.detach().view(torch.int64) % 3 + z,
    "softmax": lambda z: z.softmax(-1),
    "cross-entropy": lambda z: F.cross_entropy(z.flatten(0, 1), TOKENS.flatten()),
    "concatenation": lambda z: torch.cat([z[:, 1:], z[:, :1]], 1),
    "two caps": lambda z: (z.tanh() * 2).tanh(),
    "an einsum": lambda z: torch.einsum("btv,btw->bvw", z, z),
    "where": lambda z: torch.where(z > 0, z, 0.0),
    "gather": lambda z: z.gather(-1, TOKENS[..., None]),
    "a function": Square.apply,
    "a function of a part": lambda z: Square.apply(z[:, 1:]),
    "a function of a softcap": lambda z: Square.apply((z / 3).tanh() * 3),
    "a function that writes down": lambda z: Triple.apply(z),
    "a part of a function's": lambda z: Triple.apply(z)[:, 1:].float() / 3,
    "a reader in C++": lambda z: below(z) + z,
    "a function of a function": lambda z: Square.apply(Triple.apply(z)),
    "a function's, written to": lambda z: Triple.apply(z).masked_fill_(z > 0, 0.0),
    "a function and values": lambda z: Square.apply(z) + z,
    "an operator": lambda z: torch.ops.aten.mul.Tensor(z, z),
    "maximum": lambda z: z.max(-1).values,
    "iteration": lambda z: torch.stack([row.sum() for row in z]),
    "data": lambda z: z.data + z,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", WRITTEN_DOWN)
def test_what_models_do_is_written_down(name, bias, computed):
    f = WRITTEN_DOWN[name]
    _, model = stock_and_lazy(bias)
    logits = f(model(TOKENS))
    assert isinstance(logits, LazyLogits) and not computed
    want = f(stock_and_lazy(bias)[0](TOKENS))
    for question in (Tensor.size, Tensor.stride, Tensor.storage_offset, Tensor.is_contiguous):
        assert question(logits) == question(want), question
    assert logits.requires_grad and not computed
    compared(f, bias=bias)


@pytest.mark.parametrize("name", MADE)
def test_everything_else_gets_the_values(name):
    compared(MADE[name])


NOT_TAKEN = {
    "a negative factor": lambda z: z * -2,
    "nothing": lambda z: z * 0,
    "a truth": lambda z: z * True,
    "an infinite divisor": lambda z: z / math.inf,
    "no number": lambda z: z * math.nan,
    "integers": lambda z: z.to(torch.int64),
    "another device": lambda z: z.to("meta"),
    "as another tensor": lambda z: z.to(TOKENS),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_what_a_loss_could_not_take_is_made(name):
    """Or the recipe would say another scale or dtype than a loss knows of."""
    f = NOT_TAKEN[name]
    _, model = stock_and_lazy()
    made = f(model(TOKENS))
    assert type(made) is Tensor
    want = f(model(TOKENS) + 0)
    assert made.dtype == want.dtype and made.device == want.device and made.shape == want.shape


def test_as_many_rows_classes_and_features():
    """Where a row of one kind looks like that of another."""
    n = 4
    head = nn.Linear(n, n, bias=False)
    head.__class__, head.loss = LazyHead, Loss()
    hidden = torch.randn(n, n, n)
    want = F.linear(hidden, head.weight)
    for f in (
        lambda z: z[:, :, 0], lambda z: z[0, :, 1], lambda z: z[:, 0], lambda z: z[..., 2:3], lambda z: z.flatten(1),
        lambda z: z.view(n, -1), lambda z: z.view(-1), lambda z: z.narrow(2, 0, n), lambda z: z.unsqueeze(-1),
        lambda z: z.squeeze(), lambda z: z[None, ..., None], lambda z: z.reshape(2, 2, n, n),
    ):  # fmt: skip
        torch.testing.assert_close(f(head(hidden)) + 0, f(want), rtol=0, atol=0)


@pytest.mark.parametrize("n_rows, n_classes, n_features", [(1, 1, 1), (1, 1, 3), (1, 3, 1), (3, 1, 1), (2, 3, 1)])
def test_dimensions_of_one(n_rows, n_classes, n_features):
    head = nn.Linear(n_features, n_classes)
    head.__class__, head.loss = LazyHead, Loss()
    hidden = torch.randn(1, n_rows, n_features)
    want = F.linear(hidden, head.weight, head.bias)
    for f in (
        Tensor.squeeze, lambda z: z.squeeze(-1), lambda z: z.squeeze(0), Tensor.flatten, lambda z: z.unsqueeze(-1),
        lambda z: z[:, 0], lambda z: z[..., 0], lambda z: z.view(-1), lambda z: z.view(n_rows, n_classes),
    ):  # fmt: skip
        torch.testing.assert_close(f(head(hidden)) + 0, f(want), rtol=0, atol=0)


@pytest.mark.parametrize(
    "names", list(itertools.permutations(["a slice", "float", "a softcap", "view", "a factor"], 3))
)
def test_steps_in_any_order(names):
    def f(z):
        for name in names:
            z = WRITTEN_DOWN[name](z.contiguous())
        return z

    compared(f)


def test_scale_and_softcap_are_what_the_steps_amount_to():
    _, model = stock_and_lazy()
    z = model(TOKENS)
    recipe = (3 * ((z / 4) * 0.5).tanh() * 2).recipe
    x = z.sin().asin() + z * 0  # the values
    scaled = recipe.scale * z.detach().clone()
    assert recipe.softcap == 6.0 and x.shape == scaled.shape
    torch.testing.assert_close(6.0 * torch.tanh(scaled / 6.0), recipe.make())


WRITES = {
    "an item": lambda z: z.__setitem__((..., 2), 0.0),
    "a view": lambda z: z[:, 1:].mul_(3.0),
    "a view of a view": lambda z: z.view(-1, V)[2:4].fill_(1.0),
    "a detached one": lambda z: z.detach()[0].zero_(),
    "a view of a reader's": lambda z: z[:, 1:].transpose(1, 2).mul_(3.0),
    "some classes of a view": lambda z: z[:, 1:][..., :3].mul_(3.0),
    "some classes of a detached one": lambda z: z.detach()[..., 2:].fill_(1.0),
    "an array": lambda z: z[:, 1:].detach().numpy().fill(2.0),
    "a contiguous one": lambda z: z.view(-1, V).contiguous().mul_(2.0),
    "a contiguous copy": lambda z: z[:, 1:].contiguous().mul_(2.0),
    "a reshaped one": lambda z: z.reshape(-1, V).mul_(2.0),
    "a reshaped copy": lambda z: z[:, 1:].reshape(-1, V).mul_(2.0),
    "a view that has been read": lambda z: [part := z[:, 1:], part.exp(), part.transpose(1, 2).mul_(2.0)],
    "in place": lambda z: z.__imul__(2.0),
    "a mask": lambda z: z.masked_fill_(z > 0, 0.0),
    "out": lambda z: torch.mul(z.detach(), 2.0, out=z.detach()),
}


@pytest.mark.parametrize("reader", [lambda z: z.softmax(-1), Square.apply, lambda z: z[:, :3].float(), lambda z: z])
@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_is_there(name, reader):
    def f(z):
        WRITES[name](z)
        return reader(z)

    compared(f)


def test_what_is_written_to_a_copy_is_not():
    def f(z):
        z.clone().zero_()
        z.to(z.dtype, copy=True).zero_()
        z[MASK].zero_()
        z.float().zero_()
        return z * 1

    compared(f)


READERS = {
    "PyTorch": lambda z: z.exp(),
    "steps": lambda z: z[:, :-1].float() * 2,
    "a function": Triple.apply,
    "a function that keeps them": Square.apply,
    "C++": below,
}


@pytest.mark.parametrize("name", READERS)
def test_views_see_what_their_base_becomes(name):
    def f(z):
        part, read = z[:, 1:], z[:, 1:]
        before = read.exp()  # made by itself
        z.mul_(2.0)
        assert not (isinstance(part, LazyLogits) and part.is_lazy)
        torch.testing.assert_close(read.detach() + 0, z[:, 1:].detach() + 0)
        return before.sum() + READERS[name](part)

    compared(f)


def test_parts_are_made_alone(computed):
    """As those who look at the last row want."""
    _, model = stock_and_lazy()
    z = model(TOKENS)
    z[:, -1].argmax(-1)
    assert [recipe.hidden.shape for recipe in computed] == [(B, D)]


def test_functional_transforms_over_them():
    compared(lambda z: torch.vmap(lambda factor: z[:, 1:] * factor)(torch.arange(1.0, 4.0, dtype=z.dtype)))


def test_in_inference_mode():
    stock, model = stock_and_lazy()
    with torch.inference_mode():
        z, want = model(TOKENS), stock(TOKENS)
        for f in (Tensor.exp, Tensor.sin, lambda z: z[:, 1:].exp(), lambda z: z.mul_(2.0).cos(), lambda z: z[:, 1:]):
            torch.testing.assert_close(f(z) + 0, f(want) + 0)


def test_an_operator_that_writes_below_is_refused():
    _, model = stock_and_lazy()
    with torch.no_grad(), pytest.raises(RuntimeError, match="must not write to lazy logits: pass logits.clone"):
        with torch._C.DisableTorchFunctionSubclass():
            model(TOKENS).fill_(0.0)


def test_looking_without_gradients_does_not_lose_them():
    def f(z):
        with torch.no_grad():
            z.argmax(-1)
        with torch.inference_mode():
            z.argmax(-1)
        return z.exp()

    compared(f)


def test_no_gradients_where_there_are_none(computed):
    _, model = stock_and_lazy()
    with torch.no_grad():
        z = model(TOKENS)
    assert not z.requires_grad and z.grad_fn is None and not (z + 0).requires_grad
    z = model(TOKENS)
    assert not z.detach().requires_grad and z.requires_grad
    model.requires_grad_(False)
    assert not model(TOKENS).requires_grad and model(TOKENS).is_lazy


def test_they_are_made_once(computed):
    _, model = stock_and_lazy()
    z = model(TOKENS)
    z.exp(), z.sin(), z[:, 1:].exp(), z.argmax(-1)
    assert len(computed) == 1
    assert model.head.loss.made_by == ["exp"]


@pytest.mark.parametrize("part", [lambda z: z, lambda z: z[:, 1:]])
@pytest.mark.parametrize("reader", [Triple.apply, Square.apply, below])
@pytest.mark.parametrize("written", [lambda z: z, lambda z: z[:, 2:]])
def test_logits_that_are_written_to_behind_a_function_are_refused(part, written, reader):
    _, model = stock_and_lazy()
    z = model(TOKENS)
    read = reader(part(z))
    written(z).zero_()
    with pytest.raises(RuntimeError, match=r"after a torch.autograd.Function had read them: .*clone"):
        read.sum().backward()

    def f(z):
        read = reader(part(z.clone()))
        written(z).zero_()
        return read

    compared(f)


@pytest.mark.parametrize("part", [lambda z: z, lambda z: z[:, 1:], lambda z: z[:, 1:].float().tanh()])
def test_readers_of_both_kinds_of_one_graph(part):
    compared(lambda z: Triple.apply(part(z)) + part(z).exp() + Square.apply(part(z)))


def test_classes_that_cut_the_hidden_states(computed):
    """More hidden dimensions than classes."""
    head = nn.Linear(9, 5, bias=False)
    head.__class__, head.loss = LazyHead, Loss()
    hidden = torch.randn(2, 3, 9)
    want = F.linear(hidden, head.weight)
    for f in (lambda z: z[..., :5], lambda z: z.narrow(-1, 0, 5), lambda z: z[:, 1:, :5], lambda z: z[..., :4]):
        torch.testing.assert_close(f(head(hidden)) + 0, f(want))
    assert isinstance(head(hidden)[..., :5], LazyLogits)


def test_questions_do_not_make_them(computed):
    stock, model = stock_and_lazy()
    z, want = model(TOKENS), stock(TOKENS)
    for name in (
        "shape",
        "dtype",
        "device",
        "ndim",
        "is_cuda",
        "layout",
        "requires_grad",
        "is_leaf",
        "nbytes",
        "itemsize",
    ):
        assert getattr(z, name) == getattr(want, name), name
    for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "element_size", "__len__"):
        assert getattr(z, name)() == getattr(want, name)(), name
    assert z._base is None and z.grad_fn is not None and torch.is_tensor(z) and torch.is_floating_point(z)
    assert {z: 1}[z] == 1 and isinstance(z, Tensor)
    assert not computed


def test_values_leave_in_every_way():
    stock, model = stock_and_lazy()
    want = stock(TOKENS).detach()
    z = model(TOKENS).detach()
    assert z.tolist() == want.tolist() and repr(z) == repr(want) and (z.numpy() == want.numpy()).all()
    assert torch.equal(pickle.loads(pickle.dumps(z)), want) and torch.equal(copy.deepcopy(z), want)
    file = io.BytesIO()
    torch.save({"logits": model(TOKENS).detach()}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["logits"], want)
    assert torch.equal(torch.from_dlpack(model(TOKENS).detach()), want) and bool((z == want).all())
    assert model(TOKENS)[0, 0, 0].item() == want[0, 0, 0].item()


def test_second_derivatives_of_readers_of_both_kinds():
    for reader in (lambda z: z * z, Square.apply):
        found = []
        for model in stock_and_lazy():
            parameters = list(model.parameters())
            first = torch.autograd.grad(reader(model(TOKENS)).sum(), parameters, create_graph=True)
            found.append(torch.autograd.grad(sum((gradient**2).sum() for gradient in first), parameters))
        torch.testing.assert_close(found[1], found[0])


def test_gradients_of_logits_that_are_made():
    _, model = stock_and_lazy()
    z, seen = model(TOKENS), []
    z.retain_grad()
    z.register_hook(seen.append)
    z.exp().sum().backward()
    assert torch.equal(z.grad, z.exp()) and torch.equal(seen[0], z.grad)
    z = model(TOKENS)
    assert torch.equal(torch.autograd.grad(z.exp().sum(), z)[0], z.exp())


def test_gradients_of_logits_that_a_loss_has_gone_around_are_refused():
    _, model = stock_and_lazy()
    z = model(TOKENS)
    z.recipe.product.is_used = True
    for refused in (z.retain_grad, lambda: z.register_hook(print)):
        with pytest.raises(RuntimeError, match="no gradient with respect to lazy logits: .*lazy_logits=False"):
            refused()


class ToData(torch.optim.Optimizer):
    """Writes past the versions of parameters, as optimizers with kernels of their own do."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(parameter.grad)


@pytest.mark.parametrize("make_optimizer", [
    lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.AdamW(p), lambda p: torch.optim.AdamW(p, foreach=True),
    lambda p: torch.optim.AdamW(p, fused=True), ToData,
])  # fmt: skip
def test_logits_of_weights_that_are_gone_are_refused(make_optimizer):
    _, model = stock_and_lazy()
    optimizer = make_optimizer(model.parameters())
    early, late = model(TOKENS), model(TOKENS)
    want = early.exp().log()
    want.sum().backward()
    optimizer.step()
    assert torch.equal(early.exp().log(), want)
    with pytest.raises(RuntimeError, match="has changed since the call .*lazy_logits=False"):
        late.exp()


def test_nothing_is_lazy_where_others_follow_the_computation():
    _, model = stock_and_lazy()
    kinds = []
    torch.compile(lambda x: kinds.append(type(model(x))), backend="eager")(TOKENS)
    torch.func.vmap(lambda x: kinds.append(isinstance(model(x), LazyLogits)) or x)(TOKENS)
    frozen = copy.deepcopy(model).requires_grad_(False)
    torch.jit.trace(
        lambda x: (kinds.append(isinstance(frozen(x), LazyLogits)), frozen(x))[1], TOKENS, check_trace=False
    )
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.ones(3, D, dtype=torch.float64)
        dual = torch.autograd.forward_ad.make_dual(tangent, tangent)
        logits = model.head(dual)
        kinds.append(isinstance(logits, LazyLogits))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(logits).tangent, tangent @ model.head.weight.T)
    assert not any(kind is True or kind is LazyLogits for kind in kinds) and len(kinds) >= 4
    with torch.no_grad():
        assert not isinstance(model(TOKENS[:, :1]), LazyLogits)  # generation
    model.head.loss = None
    assert not isinstance(model(TOKENS), LazyLogits)


class Quantised(Tensor):
    """What a weight may be besides a plain tensor."""


def test_weights_that_are_not_plain_are_not_waited_for():
    for change in (
        lambda head: setattr(head, "weight", nn.Parameter(head.weight.detach().as_subclass(Quantised))),
        lambda head: setattr(head.weight, "ds_id", 3),  # DeepSpeed's ZeRO-3 takes them away
    ):
        _, model = stock_and_lazy()
        assert isinstance(model.head(torch.ones(3, D, dtype=torch.float64)), LazyLogits)
        change(model.head)
        assert not isinstance(model.head(torch.ones(3, D, dtype=torch.float64)), LazyLogits)


def test_empty_and_single():
    _, model = stock_and_lazy()
    z = model(TOKENS[:0])
    assert z.shape == (0, T, V) and z.view(-1, V).exp().shape == (0, V) and z.sum() == 0
    assert model.head(torch.ones(D, dtype=torch.float64)).exp().shape == (V,)
    assert model.head(torch.ones(D, dtype=torch.float64))[2].shape == ()
