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
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from .. import INTERRUPTED, report
from . import file
from .rows import collect, windows

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

    if not args.out.parent.is_dir():
        parser.error(f"there is no folder {args.out.parent}")
    torch.manual_seed(args.seed)
    try:
        text = (
            args.text.read_text(encoding="utf-8") if args.text else "\n\n".join(topics[key] for key in sorted(topics))
        )
        model, tokenizer = load(args.model, getattr(torch, args.dtype), report.default_device())
        sequences = windows(tokenizer, text, args.context)
        if args.sample is None:
            sequences = ((sequence, 0) for sequence in sequences)
        else:
            sequences = continued(model, sequences, max(args.context // PROMPT_SHARE, 1), args.sample)
        states = collect(model, sequences, args.rows)
    except (OSError, ImportError, ValueError) as error:  # no such file or model, a package is missing, an unknown kind
        print(f"states: {error}")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    source = args.text.name if args.text else "pydoc_data.topics"
    if args.sample is not None:
        source = f"its own {'greedy' if args.sample == 0 else f'T = {args.sample:g}'} samples after parts of {source}"
    name = Path(args.model).name if Path(args.model).exists() else args.model
    (N, D), V = states.input.shape, len(states.linear_weight)
    description = f"{name} on {source}: {N} rows, windows of {args.context} tokens, D {D}, V {V}, {args.dtype}"
    file.save(states._replace(description=description), args.out)
    print(description, f"Saved {args.out}", sep="\n")
    if N < args.rows:
        print(f"That is all of the text, {N} rows of the {args.rows} that were asked for.")
    return 0


def load(name: str, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, object]:
    """The model and its tokenizer."""
    options = {}
    if name.lower().endswith(".gguf"):
        name, options = str(Path(name).parent), dict(gguf_file=Path(name).name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name, **options)


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
