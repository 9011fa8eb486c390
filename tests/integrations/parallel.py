"""Truncated models under DDP and FSDP2: what one rank does with them, and with the stock model."""

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tce_kernels.integrations.causal_lm import truncate
from tce_kernels.integrations.lazy import Recipe
from tce_kernels.integrations.observed import Observed

from .models import spread
from .tiny import collate, data, llama, relative

THRESHOLD = 0.0099  # about 1 / V: half of the tokens of new models


def counted(f, *arguments):
    """What a function returns, and how often logits were made in it."""
    compute, seen = Recipe.compute, []
    Recipe.compute = lambda recipe: seen.append(recipe) or compute(recipe)
    try:
        return f(*arguments), len(seen)
    finally:
        Recipe.compute = compute


def rows_of(here):
    """The batch of this rank, and the number of tokens that all ranks have."""
    rows = data(4 * here.size)
    n = (collate(rows)["labels"][:, 1:] != -100).sum()
    return collate(rows[here.rank * 4 : here.rank * 4 + 4]), n


def by_definition(logits, labels, vocab_size=None, num_items_in_batch=None, **kwargs):
    """A stock model's loss function that truncates as the formula says."""
    log_prob = logits.float().log_softmax(-1)
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
    log_prob = log_prob.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    kept = (labels != -100) & (log_prob.exp() <= THRESHOLD)
    return -log_prob.where(kept, 0.0).sum() / num_items_in_batch


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(model, wrapped, batch, n, steps=2):
    """Losses and gradients of a few steps, and the parameters after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = wrapped(**batch, num_items_in_batch=n, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
    return losses, found, {name: full(parameter).detach() for name, parameter in model.named_parameters()}


def compared(here, wrap, threshold, tied):
    """Differences of losses, gradients and parameters to the stock model's, and how often logits were made."""
    batch, n = rows_of(here)
    results = []
    for is_stock in (True, False):
        model = llama(tie_word_embeddings=tied)
        if not is_stock:
            loss = truncate(model, threshold)
        elif threshold < 1:
            model.loss_function = by_definition
        results.append(counted(trained, model, wrap(here, model), batch, n))
    (want, _), (got, made) = results
    losses = max(abs(a - b) / abs(b) for a, b in zip(got[0], want[0], strict=True))
    share = loss.observed["train"].since("test").truncated
    return losses, relative(got[1], want[1]), relative(got[2], want[2]), made, share


def data_parallel(here, options, threshold, tied):
    return compared(
        here, lambda here, model: DistributedDataParallel(model, process_group=here.group, **options), threshold, tied
    )


def sharded(here, model, head=None):
    """FSDP2 with the head in the root, or in a unit of its own with these options."""
    mesh = here.mesh()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if head is not None:
        fully_shard(model.lm_head, mesh=mesh, **head)
    return fully_shard(model, mesh=mesh)


def fully_sharded(here, head, threshold, tied):
    return compared(here, lambda here, model: sharded(here, model, head), threshold, tied)


def own_loss_on_outputs(here, options):
    """A loss that a user computes from what DDP returns, which stands behind a function of DDP."""
    batch, _ = rows_of(here)
    found = []
    for is_stock in (True, False):
        model = llama()
        if not is_stock:
            truncate(model, 1.0)
        wrapped = DistributedDataParallel(model, process_group=here.group, **options)
        for _ in range(2):
            model.zero_grad()
            logits = wrapped(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten()).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    return relative(found[1], found[0])


def evaluated(here, head):
    """Logits and loss of an evaluation, against the stock model's that is not sharded; is the head in shards again?"""
    batch, n = rows_of(here)
    want = spread(llama()).eval()(**batch, num_items_in_batch=n)
    model = spread(llama()).eval()
    truncate(model, 1.0)
    sharded(here, model, head)
    with torch.no_grad():
        got = model(**batch, num_items_in_batch=n)
    of_logits, of_loss = (got.logits - want.logits).abs().max().item(), (got.loss - want.loss).abs().item()
    return of_logits, of_loss, isinstance(model.lm_head.weight, DTensor)


def read_after_a_step(here, head, fused):
    """What a reader of logits meets whose weights have changed."""
    batch, n = rows_of(here)
    model = llama()
    truncate(model, 1.0)
    sharded(here, model, head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    outputs = model(**batch, num_items_in_batch=n, use_cache=False)
    outputs.loss.backward()
    optimizer.step()
    try:
        return f"read {outputs.logits.exp().sum()}"
    except RuntimeError as error:
        return str(error)


def read_before_a_step(here, head, is_after_backward):
    """Logits of a training step, against those of a model that is not sharded, or why there are none."""
    batch, n = rows_of(here)
    want = llama()(**batch).logits
    model = llama()
    truncate(model, 1.0)
    sharded(here, model, head)
    outputs = model(**batch, num_items_in_batch=n, use_cache=False)
    if is_after_backward:
        outputs.loss.backward()
    try:
        return (outputs.logits.detach() - want).abs().max().item()
    except RuntimeError as error:
        return str(error)


def statistics_of_all(here):
    """Of all ranks together; the second rank has seen nothing, the third no tokens."""
    batch, n = rows_of(here)
    if here.rank == 2:
        batch["labels"].fill_(-100)
    model = spread(llama())
    loss = truncate(model, THRESHOLD)
    if here.rank != 1:
        model(**batch, num_items_in_batch=n)
    return loss.observed["train"].since("all", reduce=True), loss.observed["train"].since("mine")


def statistics_of_nothing(here):
    return Observed().since("all", reduce=True)
