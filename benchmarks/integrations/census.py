"""All causal and vision-language models of the installed transformers, small and random: truncated and as they are.

Of each: the loss, all gradients and logits at threshold 1 next to the stock model's, the same of the truncated loss
next to its definition, and a greedy continuation.
"""

import copy
import inspect
import logging
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from tce_kernels.integrations.causal_lm import truncate
from tce_kernels.integrations.lazy import Recipe

from .. import report
from .configs import VOCABULARY, small_ones
from .definition import Definition

PATH = report.ROOT / "results" / "census.csv"

MAPPINGS = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING, "vision": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}
VERDICTS = LAZY, EQUAL, REFUSED, NOT_BUILT, WRONG = "lazy", "equal", "refused", "not built", "wrong"
EXACT = 1e-6  # of float32 sums in another order
SECONDS = 120  # of a processor, for one model
SPREAD = 2.0  # standard deviation of logits
PARAMETERS = 3e7  # of a model that counts as small


class Finding(NamedTuple):
    mapping: str
    model: str  # its class
    verdict: str
    reason: str


def classes(mapping: str) -> dict[str, tuple[type, type]]:
    """Configuration and model, by the name of the model."""
    found = {}
    for config, models in MAPPINGS[mapping].items():
        for model in models if isinstance(models, tuple) else (models,):
            found.setdefault(model.__name__, (config, model))
    return found


class Step(NamedTuple):
    loss: float
    gradients: dict[str, Tensor]
    logits: Tensor


def step(model: nn.Module, inputs: dict[str, Tensor]) -> Step:
    torch.manual_seed(1)
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(outputs.loss.item(), gradients, outputs.logits)


def deviation(mine: Step, other: Step) -> float:
    """The largest difference of losses and of gradients, each to the largest of the other's.

    A parameter without a gradient has zeros.
    """
    largest = max((gradient.abs().max().item() for gradient in other.gradients.values()), default=0.0)
    zero = torch.zeros(())
    gradients = [
        (mine.gradients.get(name, zero) - other.gradients.get(name, zero)).abs().max().item() / largest
        for name in mine.gradients.keys() | other.gradients.keys()
    ]
    loss = abs(mine.loss - other.loss) / max(1, abs(other.loss))
    return torch.tensor([loss, *gradients]).max().item()  # NaN if one of them is


def rounding(model: nn.Module, inputs: dict[str, Tensor], want: Step) -> float:
    """What a last bit of the head's weight makes of a step: a deep model may make much of it."""
    model.get_output_embeddings().weight.data.mul_(1 + torch.finfo(torch.float32).eps)
    return deviation(step(model, inputs), want)


def build(config_class: type, model_class: type) -> tuple[nn.Module, dict[str, Tensor]]:
    """The first of the small models that makes a training step, before it has made one, and its inputs."""
    refusal = None
    for config in small_ones(config_class):
        if getattr(model_class, "config_class", None) not in (None, type(config)) and hasattr(config, "text_config"):
            config = config.text_config
        try:
            config._attn_implementation = "eager"
            with torch.device("meta"):
                n = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
            if n > PARAMETERS:
                raise MemoryError(f"{n / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            model = model_class(config).float().train()
            for inputs in some_inputs(model):
                try:
                    logits = step(copy.deepcopy(model), inputs).logits
                except Exception as error:
                    refusal = refusal or error
                    continue
                head = model.get_output_embeddings()
                if head is not None:  # or all tokens would have about the same confidence
                    head.weight.data.mul_(SPREAD / logits.std())
                return model, inputs
        except Exception as error:
            refusal = refusal or error
    raise refusal


def some_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    head = model.get_output_embeddings()
    n_classes = VOCABULARY if head is None else min(VOCABULARY, len(head.weight))
    tokens = torch.randint(4, n_classes, (2, 12), generator=generator)
    labels = tokens.clone()
    labels[0, :4] = -100
    text = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    known = inspect.signature(model.forward).parameters
    if "use_cache" in known:
        text["use_cache"] = False
    if "mm_token_type_ids" in known:
        text["mm_token_type_ids"] = torch.zeros_like(tokens)
    yield text
    if "pixel_values" in known:
        parts = [model.config, *(part for part in vars(model.config).values() if isinstance(part, PretrainedConfig))]
        size = next((part.image_size for part in parts if hasattr(part, "image_size")), 16)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        image = torch.rand(2, 3, height, width, generator=generator)
        yield text | {"pixel_values": image}
        yield text | {"pixel_values": image[:, None]}  # one of several


def examine(config_class: type, model_class: type) -> tuple[str, str]:
    """Verdict and reason."""
    try:
        model, inputs = build(config_class, model_class)
    except Exception as error:  # of whatever kind: a class that knows other sizes than these
        return NOT_BUILT, in_short(error)
    mine, another = copy.deepcopy(model), copy.deepcopy(model)  # before steps, whose states may not let them
    want = step(model, inputs)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            loss = truncate(mine, 1.0)
        except TypeError as error:
            return REFUSED, in_short(error)
        got, made = watched(step, mine, inputs)
    if not loss.calls:
        return WRONG, "the loss is not called"
    exact = EXACT
    if not (off := deviation(got, want)) <= exact:
        exact = max(EXACT, 2 * rounding(another, inputs, want))
        if not off <= exact:
            return WRONG, f"off by {off:.0e} at threshold 1"
    if not torch.equal(got.logits, want.logits):
        return WRONG, "other logits"
    definition = Definition(model.loss_function is ForCausalLMLoss)
    model.loss_function = definition
    step(model, inputs)
    definition.threshold = definition.between(0.25, 0.75)  # so that rounding decides nothing
    loss.threshold.fill_(definition.threshold)
    if not (off := deviation(step(mine, inputs), step(model, inputs))) <= exact:
        return WRONG, f"off by {off:.0e} where truncated"
    told = continued_alike(mine.eval(), model.eval(), inputs)
    if told is None:
        return WRONG, "generates other tokens"
    if loss.fused and not made:
        return LAZY, told
    reasons = [str(warning.message) for warning in said if "logits" in str(warning.message)]
    return EQUAL, "; ".join(filter(None, [*reasons, told]))


def watched(function, *arguments):
    """What a function returns, and whether logits have been made in it."""
    made, compute = [], Recipe.compute
    Recipe.compute = lambda recipe: made.append(recipe) or compute(recipe)
    try:
        return function(*arguments), bool(made)
    finally:
        Recipe.compute = compute


def continued_alike(mine: nn.Module, stock: nn.Module, inputs: dict[str, Tensor]) -> str | None:
    """None if it is not; empty, or why the stock model does not generate."""
    prompt = {name: tensor for name, tensor in inputs.items() if name not in ("labels", "use_cache")}
    how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    try:
        want = stock.generate(**prompt, **how)
    except Exception as error:
        return f"does not generate: {in_short(error)}"
    return "" if torch.equal(mine.generate(**prompt, **how), want) else None


def in_short(error: Exception) -> str:
    """Its last line: validators of configurations say only there what is wrong."""
    text = (str(error).strip() or "-").splitlines()[-1].strip()
    return f"{type(error).__name__}: {text}"[:160]


def take(wanted: list[str]) -> Iterator[Finding]:
    """Findings of all models, or of those that are wanted, one after the other, from processes of one thread each."""
    tasks = [(mapping, name) for mapping in MAPPINGS for name in classes(mapping) if not wanted or name in wanted]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, _start) as pool:
        yield from pool.map(_run, *zip(*tasks, strict=True))


def _start() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(logging.CRITICAL)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    signal.signal(signal.SIGPROF, _too_late)


class TooLate(BaseException):
    """Which no model catches."""


def _too_late(*_) -> None:
    raise TooLate


def _run(mapping: str, name: str) -> Finding:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return Finding(mapping, name, *examine(*classes(mapping)[name]))
    except TooLate:
        return Finding(mapping, name, NOT_BUILT, f"takes more than {SECONDS} s")
    except Exception as error:  # where only the truncated model fails
        return Finding(mapping, name, WRONG, in_short(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
