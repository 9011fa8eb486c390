"""Save the hidden states of a causal language model from Hugging Face: of a text, or of what it writes itself.

The file is for `python -m benchmarks linear --states FILE`. Without --text, the text is the documentation that every
CPython carries, `pydoc_data.topics`.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from .. import INTERRUPTED, report
from . import file
from .file import States

DTYPES = ["float32", "bfloat16", "float16"]
GENERATED_TOGETHER = 8  # texts
PROMPT_SHARE = 4  # of a window that is sampled, one part in so many is real text


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks states",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a name on the Hugging Face hub, a folder, or a GGUF file")
    parser.add_argument("--out", required=True, type=Path, help="the file to write")
    parser.add_argument("--text", type=Path, help="a file in UTF-8")
    parser.add_argument("--rows", type=_positive, default=4096, help="tokens to predict (default: %(default)s)")
    parser.add_argument("--context", type=_positive, default=512, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of model and file (default: %(default)s)")
    parser.add_argument(
        "--sample",
        type=_temperature,
        metavar="greedy|TEMPERATURE",
        help="predict what the model itself writes after the first quarter of each window",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    try:
        model, tokenizer = load(args.model, getattr(torch, args.dtype), report.default_device())
    except (OSError, ImportError, ValueError) as error:  # no such model, a package for it is missing, unknown kind
        print(f"{args.model} cannot be loaded: {error}")
        return 1
    text = args.text.read_text(encoding="utf-8") if args.text else "\n\n".join(topics[name] for name in sorted(topics))
    try:
        sequences = windows(tokenizer, text, args.context)
        if args.sample is not None:
            sequences = continued(model, sequences, args.context // PROMPT_SHARE, args.sample)
        else:
            sequences = ((sequence, 0) for sequence in sequences)
        states = collect(model, sequences, args.rows)
    except KeyboardInterrupt:
        return INTERRUPTED
    source = args.text.name if args.text else "pydoc_data.topics"
    if args.sample is not None:
        source = f"its own {'greedy' if args.sample == 0 else f'T = {args.sample:g}'} samples after parts of {source}"
    name = Path(args.model).name if Path(args.model).exists() else args.model
    (N, D), V = states.input.shape, len(states.linear_weight)
    description = f"{name} on {source}: {N} rows, windows of {args.context} tokens, D {D}, V {V}, {args.dtype}"
    file.save(states._replace(description=description), args.out)
    if N < args.rows:
        print(f"The text has fewer than {args.rows} tokens.")
    print(description, f"Saved {args.out}", sep="\n")
    return 0


def load(name: str, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, object]:
    """The model and its tokenizer."""
    options = {}
    if name.lower().endswith(".gguf"):
        name, options = str(Path(name).parent), dict(gguf_file=Path(name).name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name, **options)


def windows(tokenizer, text: str, context: int) -> Iterator[Tensor]:
    """Tokens [context + 1] that cover the text once, the first or the last of each twice."""
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    # Where a tokenizer begins a text with a token of its own, models rely on it.
    first = torch.tensor([token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id]).long()
    length = context + 1 - len(first)
    for start in range(0, len(tokens) - 1, context):
        if len(window := tokens[start : start + length]) > 1:
            yield torch.cat([first, window])


@torch.no_grad()
def continued(
    model: nn.Module, sequences: Iterator[Tensor], prompt: int, temperature: float
) -> Iterator[tuple[Tensor, int]]:
    """Sequences whose tokens after the first `prompt` are the model's own, up to the end of a text, and the first row
    that predicts one."""
    complete = (sequence for sequence in sequences if len(sequence) > prompt)
    while together := list(itertools.islice(complete, GENERATED_TOGETHER)):
        prompts = torch.stack([sequence[:prompt] for sequence in together]).to(model.device)
        n_new = max(map(len, together)) - prompt
        ends = model.generation_config.eos_token_id
        drawing = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else {}
        pad = ends[0] if isinstance(ends, list) else ends
        config = GenerationConfig(max_new_tokens=n_new, eos_token_id=ends, pad_token_id=pad, **drawing)
        written = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
        is_end = torch.isin(written[:, prompt:], torch.tensor(ends if ends is not None else [], device=model.device))
        for sequence, ended in zip(written, is_end, strict=True):
            length = ended.int().argmax() + 1 if ended.any() else n_new
            yield sequence[: prompt + length], prompt - 1


@torch.no_grad()
def collect(model: nn.Module, sequences: Iterator[tuple[Tensor, int]], N: int) -> States:
    """The first N rows of all sequences, each from its given row on; fewer if there are no more."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    states = States(
        None, head.weight, None, head.bias, scale, getattr(config, "final_logit_softcapping", None), description=""
    )
    given = []
    handle = head.register_forward_pre_hook(lambda head, arguments: given.append(arguments[0]))
    inputs, targets, missing = [], [], N
    with tqdm(total=N, unit="row", leave=False) as progress:
        for sequence, first in sequences:
            sequence = sequence.to(model.device)
            given.clear()
            logits = model(sequence[None, :-1], use_cache=False).logits[0]
            [[input]] = given
            if not inputs:
                refuse_other_heads(states._replace(input=input), logits)
            inputs.append(input[first:][:missing].cpu())
            targets.append(sequence[1:][first:][:missing].cpu())
            progress.update(len(targets[-1]))
            missing -= len(targets[-1])
            if not missing:
                break
    handle.remove()
    return states._replace(input=torch.cat(inputs), target=torch.cat(targets))


def refuse_other_heads(states: States, logits: Tensor) -> None:
    """Raise ValueError unless the model makes its logits as the file will say."""
    mine = states.logit_scale * nn.functional.linear(states.input, states.linear_weight, states.linear_bias).float()
    if states.softcap is not None:
        mine = states.softcap * torch.tanh(mine / states.softcap)
    error = ((mine - logits).norm() / logits.float().norm()).item()
    if not error < 10 * torch.finfo(states.input.dtype).eps:
        raise ValueError(f"what follows the head of this model is not known here: its logits differ by {error:.0e}")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _temperature(text: str) -> float:
    """0 for greedy decoding."""
    if text == "greedy":
        return 0.0
    if not (temperature := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"must be greedy or a number above 0, got {text}")
    return temperature
