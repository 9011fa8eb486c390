"""Time and memory of a training step of small models, forward and backward: as they are, and with other losses."""

import copy
import math
from collections.abc import Callable
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from tce_kernels.integrations.causal_lm import truncate

from .. import report
from ..timing.measure import OURS, Inexact, Observed, Provider, checked, interleaved, quantiles, ratio, run
from .definition import Definition

STOCK = "the model as it is"
VOCABULARY = 49152
SHARE = 0.5  # of the tokens, where some are truncated
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}  # of gradients in norm, in as many layers as there are


class Case(NamedTuple):
    """A Llama with tied embeddings."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    sequences: int
    length: int  # of each

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=VOCABULARY,
            num_hidden_layers=self.layers,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.length,
            tie_word_embeddings=True,
        )


CASES = [
    Case("2 layers of 256", 2, 256, 512, 4, 4, 2, 768),
    Case("SmolLM2-135M", 30, 576, 1536, 9, 3, 1, 256),
]


def sharing_parameters(model: nn.Module) -> nn.Module:
    """A model of its own with the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def new_model(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Random weights, larger ones in the head, so that confidences differ; and random tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(case.config).to(device, dtype)
    nn.init.normal_(model.lm_head.weight, std=2 / math.sqrt(case.width))
    return model, torch.randint(VOCABULARY, (case.sequences, case.length), device=device)


def loss_of(model: nn.Module, **options) -> Callable[..., Tensor]:
    """Of parameters, which are the model's, and tokens."""
    return lambda *inputs: model(inputs[-1], labels=inputs[-1], use_cache=False, **options).loss


def ours(model: nn.Module, threshold: float, **options) -> Callable[..., Tensor]:
    model = sharing_parameters(model)
    truncate(model, threshold, **options)
    return loss_of(model)


def with_trl(model: nn.Module) -> Callable[..., Tensor]:
    from trl.trainer.utils import add_fused_lm_head

    model = sharing_parameters(model)
    add_fused_lm_head(model)
    return loss_of(model, fused_lm_head=True)


def with_liger(model: nn.Module) -> Callable[..., Tensor]:
    """Only the loss is Liger's."""
    from liger_kernel.transformers.model.llama import lce_forward

    model = sharing_parameters(model)
    model.forward = MethodType(lce_forward, model)
    return loss_of(model)


def providers(model: nn.Module, threshold: float) -> tuple[list[Provider], list[str]]:
    """Stock first; and a line for everyone who is not measured."""
    found = [
        Provider(STOCK, loss_of(model), truncates=False),
        Provider(OURS, ours(model, 1.0)),
        Provider(f"{OURS}, {SHARE:.0%} truncated", ours(model, threshold)),
        Provider(f"{OURS}, logits in memory", ours(model, 1.0, lazy_logits=False)),
    ]
    missing = []
    for title, distribution, build, needs_gpu in (
        ("TRL", "trl", with_trl, False),
        ("Liger-Kernel", "liger-kernel", with_liger, True),
    ):
        if report.version(distribution) is None:
            missing.append(f"{title}: not installed")
        elif needs_gpu and model.device.type != "cuda":
            missing.append(f"{title}: needs a GPU")
        else:
            found.append(Provider(f"{title} {report.version(distribution)}", build(model), truncates=False))
    return found, missing


def checker(expected: dict[float, tuple[float, list[Tensor]]], threshold: float, tolerance: float) -> Callable:
    """Compares with what the definition gives at the provider's threshold."""

    def check(provider: Provider, observed: Observed) -> None:
        loss, gradients = expected[threshold if "truncated" in provider.name else 1.0]
        pairs = list(zip(observed.gradients, gradients, strict=True))
        error = math.sqrt(sum((a.double() - b).square().sum().item() for a, b in pairs))
        error /= math.sqrt(sum(b.double().square().sum().item() for _, b in pairs))
        if not max(error, abs(observed.loss.item() - loss) / loss) <= tolerance:
            raise Inexact(f"loss {observed.loss.item():.7g} instead of {loss:.7g}, gradients off by {error:.1e}")

    return check


def measure(case: Case, device: torch.device, rounds: int, progress: tqdm) -> tuple[list[dict], list[str]]:
    """One row of results per provider; and a line for everyone who is not measured."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokens = new_model(case, device, dtype)
    inputs = (*model.parameters(), tokens)
    definition = Definition(is_shifted=True)
    by_definition = sharing_parameters(model)
    by_definition.loss_function = definition
    loss = loss_of(by_definition)
    expected = {}
    for threshold in (1.0, None):
        definition.threshold = threshold or definition.between(SHARE - 0.01, SHARE + 0.01)
        value = loss(*inputs)
        expected[definition.threshold] = value.item(), torch.autograd.grad(value, inputs[:-1])
    check = checker(expected, definition.threshold, TOLERANCE[dtype])

    field, missing = providers(model, definition.threshold)
    progress.total += rounds * len(field)
    extra = []
    for provider in field:
        progress.set_postfix_str(f"check {provider.name}")
        if device.type == "cuda":  # where kernels are compiled first
            run(provider, inputs)
        extra.append(checked(provider, inputs, check)[1])
    times = [[timed.ms for timed in of_one] for of_one in interleaved(field, inputs, rounds, progress)]
    return [
        dict(model=case.name, tokens=tokens.numel(), provider=provider.name)
        | quantiles(times[i])
        | dict(
            time_over_stock=ratio(times[i], times[0]), extra_peak_MiB=extra[i], memory_over_stock=extra[i] / extra[0]
        )
        for i, provider in enumerate(field)
    ], missing
