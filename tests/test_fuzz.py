"""A sample of the fuzz; all of it is `python -m tests.fuzz`."""

import warnings

import pytest
import torch

from tests.fuzz import __main__ as fuzz

SEED = 20
SAMPLE = {"torch": 180, "reference": 100, "triton": 20}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are small
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", SAMPLE)
def test_random_calls_give_what_the_definition_says(backend):
    if backend == "triton" and not fuzz.HAS_TRITON:
        pytest.skip("needs Triton's interpreter")
    wrong = []
    for number in range(SAMPLE[backend]):
        loss, _ = fuzz.choice_of(SEED, number, fuzz.LOSSES, [backend])
        failure = fuzz.run(SEED, number, loss, backend)
        if failure:
            kind, detail, _ = failure
            wrong.append(f"{kind}: {detail}; {fuzz.command(SEED, number, loss, backend)}")
    assert not wrong, "\n".join(wrong)
