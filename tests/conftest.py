"""The Triton kernels run on the GPU where there is one, and otherwise in Triton's interpreter on the CPU."""

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported: the workers share the cores
# Of cuBLAS: without the first every matmul warns in deterministic mode, with the second float32 matmuls are rounded.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.pop("NVIDIA_TF32_OVERRIDE", None)

import torch  # noqa: E402 - after what is read when it is imported

torch.set_float32_matmul_precision("highest")  # some containers lower it by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when a kernel is defined, so before any import of it

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_make_parametrize_id(val):
    """Readable, and the same in every process: the text of a function holds its address."""
    return getattr(val, "__name__", None) or str(val)


def pytest_report_header():
    if not importlib.util.find_spec("triton"):
        return 'The Triton kernels are left out, triton is not installed: pip install -e ".[triton]"'
    return f"The Triton kernels run {'on the GPU' if DEVICE == 'cuda' else 'in the interpreter, on the CPU'}"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """`pytest` without arguments runs in as many processes as there are cores, if pytest-xdist is installed.

    Not here: what is named on the command line, `pytest benchmarks` among it, and what -n says otherwise.
    """
    option = config.option
    if config.args == ["tests"] and WORKER:
        option.loadgroup = True  # pytest-xdist tells its workers only what the command line says
    elif config.args == ["tests"] and getattr(option, "numprocesses", 0) is None:
        option.numprocesses, option.maxprocesses = "auto", option.maxprocesses or 4
        option.dist = "loadgroup"  # all that compiles kernels goes to one process
        option.benchmark_disable = True  # pytest-benchmark has nothing to do here, and would warn of the others
        os.environ.setdefault("PYTHONHASHSEED", "0")  # processes have to find the same tests, in the same order


@pytest.fixture
def device():
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised outputs read as NaN, so that a store which a kernel forgot fails the comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fused_multiplication(monkeypatch):
    """Older interpreters round `tl.fma` twice, which no GPU does: float64 holds the product of two float32."""
    if DEVICE == "cuda" or not importlib.util.find_spec("triton"):
        return
    from triton.runtime import interpreter

    def fma(self, x, y, z):
        exact = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

    if not hasattr(interpreter._interpreter, "fma_fp32"):
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


@pytest.fixture(autouse=True)
def one_patch_a_launch(monkeypatch):
    """The interpreter patches `triton.language` anew for each call inside a kernel, which takes most of its time."""
    if DEVICE == "cuda" or not importlib.util.find_spec("triton"):
        return
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    import triton.language as tl

    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    scopes = {}  # of the launch, by the modules that are patched

    def patch_once(function):
        modules = frozenset(module.__name__ for module in (tl, tl.core) if module in function.__globals__.values())
        if modules not in scopes:
            scopes[modules] = patch(function)
        return scopes[modules]

    def restore_and_forget(scope):
        scopes.clear()
        restore(scope)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter._LangPatchScope, "restore", restore_and_forget)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in every dimension at sizes that the interpreter gets through."""
    from tce_kernels import torch_ops

    monkeypatch.setattr(torch_ops, "BLOCK_LOGITS", 256)
    if importlib.util.find_spec("triton"):
        from tce_kernels import triton_ops

        monkeypatch.setattr(triton_ops, "WARP", 1)  # blocks of 64


@pytest.fixture(scope="session")
def ranks():
    """The processes over which losses are distributed, started by the first test that runs something there."""
    from tests.distributed.ranks import processes

    started = processes()
    yield started
    started.stop()


@pytest.fixture(scope="session")
def variants():
    """Compiled launches by target; all targets compile side by side from the first test that asks for one."""
    from benchmarks.codegen.compiled import ARGUMENTS, compile_for

    processes = []
    pool = ThreadPoolExecutor(os.cpu_count())
    futures = {target: pool.submit(compile_for, target, [], processes, lambda: None) for target in ARGUMENTS}
    yield lambda target: futures[target].result()
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
