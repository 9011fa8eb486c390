"""The rows of a file of hidden states, from any causal language model that has the interface of Hugging Face's."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .file import States


def windows(tokenizer, text: str, context: int) -> Iterator[Tensor]:
    """Sequences [context + 1] that between them predict every token of the text once; the last may be shorter."""
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    # Where a tokenizer begins a text with a token of its own, models rely on it.
    first = torch.tensor([token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id]).long()
    length = context + 1 - len(first)
    for start in range(0, len(tokens), context):
        window = torch.cat([first, tokens[start : start + length]])
        if len(window) > 1:
            yield window


@torch.no_grad()
def collect(model: nn.Module, sequences: Iterator[tuple[Tensor, int]], N: int) -> States:
    """The first N rows of the sequences, each from its given row on; fewer if there are no more.

    Raises ValueError if there are none, or if the model makes its logits in a way that the file cannot say.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    softcap = getattr(config, "final_logit_softcapping", None)
    states = States(None, head.weight, None, head.bias, scale, softcap, description="")
    given, inputs, targets = [], [], []
    handle = head.register_forward_pre_hook(lambda head, arguments: given.append(arguments[0]))
    with tqdm(total=N, unit="row", leave=False) as progress:
        for sequence, first in sequences:
            sequence = sequence.to(model.device)
            given.clear()
            logits = model(sequence[None, :-1], use_cache=False).logits[0]
            [[input]] = given
            if not inputs:
                refuse_other_heads(states._replace(input=input), logits)
            rows = slice(first, first + N - progress.n)
            inputs.append(input[rows].cpu())
            targets.append(sequence[1:][rows].cpu())
            progress.update(len(targets[-1]))
            if progress.n == N:
                break
    handle.remove()
    if not inputs:
        raise ValueError("the text is too short: there is no token to predict")
    return states._replace(input=torch.cat(inputs), target=torch.cat(targets))


def refuse_other_heads(states: States, logits: Tensor) -> None:
    mine = states.logit_scale * F.linear(states.input, states.linear_weight, states.linear_bias).float()
    if states.softcap is not None:
        mine = states.softcap * torch.tanh(mine / states.softcap)
    error = ((mine - logits).norm() / logits.float().norm()).item()
    if not error < 10 * torch.finfo(states.input.dtype).eps:
        raise ValueError(
            f"what follows the model's head is not known here: its logits are {error:.0e} from those of it"
        )
