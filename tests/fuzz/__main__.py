"""Random calls of the public losses against their definition: python -m tests.fuzz --cases 30000 --seed 0

Loss, gradients, statistics, dtypes, shapes, layouts, refusals, what may be written to, and second backwards; see
`drawing` for what is drawn, `definition` and `expected` for what is right and how exactly. Ctrl-C gives the summary.
"""

import argparse
import importlib.util
import os
import sys
import traceback
import warnings
from collections import defaultdict
from pathlib import Path

import torch

if __name__ == "__main__" or not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when a kernel is defined

from tests.fuzz.drawing import BACKENDS, LOSSES, draw_case  # noqa: E402
from tests.fuzz.promises import Wrong, check  # noqa: E402
from tests.fuzz.values import Draw  # noqa: E402

HAS_TRITON = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
SHARES = {"torch": 0.6, "reference": 0.25, "triton": 0.15}  # of the cases, with --backend all


def run(seed, number, loss, backend):
    """None, or (kind, detail, case) of the case of this number."""
    case = draw_case(seed, number, loss, backend)
    try:
        check(case)
    except Wrong as wrong:
        return wrong.kind, wrong.detail, case
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        detail = f"{error} ({Path(where.filename).name}:{where.lineno})"
        return f"raised {type(error).__name__}", detail.replace("\n", " ")[:400], case
    return None


def choice_of(seed, number, losses, backends):
    """Loss and backend of the case of this number."""
    draw = Draw(f"{seed} {number}")
    return draw.choice(losses), draw.choices(backends, [SHARES[name] for name in backends])[0]


def command(seed, number, loss, backend):
    """What repeats one case."""
    return f"python -m tests.fuzz --seed {seed} --case {number} --loss {loss} --backend {backend}"


def describe(case):
    shapes = ["None" if laid is None else f"{list(laid.size)} {laid.kind}" for laid in case.inputs]
    options = {
        name: f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in case.options.items()
    }
    if case.rule == "truncated":
        options["threshold"] = case.threshold
    else:
        options["gamma"], options["alpha"] = case.gamma, case.alpha
    target = "None" if case.target is None else str(case.target.dtype)
    extra = {
        "target": target,
        "context": case.context,
        "autocast": case.autocast,
        "module": case.as_module,
        "needs": case.needs,
    }
    extra["upstream"] = case.upstream.item() if case.upstream.numel() == 1 else "per row"
    return f"{case.dtype} {', '.join(shapes)} {options} {extra}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=("all", *BACKENDS), default="all")
    parser.add_argument("--loss", choices=("all", *LOSSES), default="all")
    parser.add_argument("--case", type=int, help="only the case of this number")
    options = parser.parse_args(arguments)
    losses = LOSSES if options.loss == "all" else [options.loss]
    backends = [name for name in BACKENDS if name != "triton" or HAS_TRITON]
    backends = backends if options.backend == "all" else [options.backend]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    numbers = range(options.cases) if options.case is None else [options.case]
    failures, done = defaultdict(list), 0
    from tqdm import tqdm

    progress = tqdm(numbers, smoothing=0.05, disable=len(numbers) == 1)
    try:
        for number in progress:
            loss, backend = choice_of(options.seed, number, losses, backends)
            wrong = run(options.seed, number, loss, backend)
            done += 1
            if wrong:
                kind, detail, case = wrong
                again = command(options.seed, number, loss, backend)
                progress.write(f"{kind}: {detail}\n    {again}\n    {describe(case)}")
                failures[backend, loss, kind].append(number)
    except KeyboardInterrupt:
        progress.write("interrupted")
    finally:
        progress.close()
    n_wrong = sum(map(len, failures.values()))
    print(f"{done} cases, {n_wrong} wrong" + (f", seed {options.seed}" if done > 1 else ""))
    for (backend, loss, kind), where in sorted(failures.items(), key=lambda item: -len(item[1])):
        print(f"{len(where):6} {backend:9} {loss:16} {kind}: cases {', '.join(map(str, where[:5]))}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
