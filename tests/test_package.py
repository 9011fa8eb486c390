"""What holds for the package as a whole: imports, optional triton, README."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import needs_triton

import tce_kernels

ROOT = Path(__file__).parents[1]

ALLOWED = {
    "__init__": {"distributed", "functional", "modules", "reference", "stats"},
    "distributed": {"checks", "functional", "options", "ranks", "shards"},
    "modules": {"functional", "options", "ranks", "stats"},
    "functional": {
        "autograd", "checks", "context", "dtensors", "fsdp", "head", "linear", "options", "ranks", "reference", "stats",
        "torch_ops",
    },
    "dtensors": {"fsdp", "options"},
    "fsdp": set(),
    "ranks": {"autograd", "context", "shards"},
    "options": {"checks", "context"},
    "checks": {"context", "layout"},
    "linear": {
        "autograd", "chunks", "context", "gradients", "head", "layout", "linear_ranks", "options", "shards", "stats",
    },
    "linear_ranks": {"autograd", "chunks", "gradients", "head", "options", "shards", "stats"},
    "chunks": {"gradients", "head"},
    "gradients": {"head", "options", "shards", "torch_ops"},
    "head": {"checks"},
    "autograd": {"context", "layout", "options", "shards", "stats", "torch_ops", "triton_ops"},
    "shards": {"options"},
    "triton_ops": {"kernels", "stats"},
    "kernels": {"sweeps"},
    "sweeps": {"stats"},
    "torch_ops": {"stats"},
    "reference": {"context", "stats"},
    "context": set(),
    "layout": set(),
    "stats": set(),
    "integrations.observed": set(),
    "integrations.schedules": {"integrations.observed"},
    "integrations.lazy": set(),
    "integrations.causal_lm": {"integrations.lazy", "integrations.observed"},
    "integrations.trainer": {"integrations.causal_lm", "integrations.observed", "integrations.schedules"},
    "integrations.trl": {"integrations.causal_lm", "integrations.trainer"},
    "integrations.torchtitan": set(),
}  # fmt: skip


# Of the benchmarks, by room and module. A room imports nothing of another one that does not stand here.
BENCHMARKS = {
    "__main__": set(),  # subcommands are loaded by name
    "conftest": set(),
    "report": set(),
    "plots": set(),
    "timing.profiles": set(),
    "timing.measure": {"timing.profiles"},
    "timing.peers": {"report", "timing.measure"},
    "timing.figures": {"plots", "timing.measure"},
    "timing.suite": {"report", "timing.figures", "timing.measure"},
    "timing.logits": {"timing.measure", "timing.peers", "timing.suite"},
    "timing.heads": {"timing.logits", "timing.measure", "timing.peers", "timing.suite"},
    "timing.linear": {"timing.heads", "timing.measure", "timing.states", "timing.suite"},
    "timing.states": {"plots", "report", "states.file", "timing.heads", "timing.measure", "timing.suite"},
    "timing.correctness": set(),
    "timing.gpu": {
        "report", "timing.correctness", "timing.linear", "timing.logits", "timing.measure", "timing.peers",
        "timing.profiles", "timing.suite",
    },
    "timing.bench_losses": {"timing.heads", "timing.linear", "timing.logits", "timing.measure"},
    "states.file": set(),
    "states.rows": {"states.file"},
    "states.command": {"report", "states.file", "states.rows"},
    "integrations.configs": set(),
    "integrations.definition": set(),
    "integrations.census": {"report", "integrations.configs", "integrations.definition"},
    "integrations.steps": {"report", "timing.measure", "integrations.definition"},
    "integrations.finetune": {"states.command", "states.rows"},
    "integrations.command": {
        "report", "timing.measure", "integrations.census", "integrations.finetune", "integrations.steps",
    },
    "codegen.devices": set(),
    "codegen.sass": set(),
    "codegen.cases": set(),
    "codegen.resources": {"codegen.cases", "codegen.sass"},
    "codegen.compiled": {"codegen.cases", "codegen.devices", "codegen.resources"},
    "codegen.command": {"report", "codegen.cases", "codegen.compiled", "codegen.devices"},
    "distributed.model": set(),
    "distributed.ranks": set(),
    "distributed.schemes": set(),
    "distributed.counted": {"distributed.ranks"},
    "distributed.cases": {"timing.linear", "timing.measure", "timing.suite", "distributed.schemes"},
    "distributed.volume": {"distributed.cases", "distributed.counted"},
    "distributed.peers": {"report", "distributed.cases", "distributed.schemes"},
    "distributed.times": {
        "timing.measure", "timing.suite", "distributed.cases", "distributed.peers", "distributed.ranks",
    },
    "distributed.figures": {"plots", "distributed.cases", "distributed.model"},
    "distributed.tables": {"distributed.cases"},
    "distributed.command": {
        "report", "distributed.cases", "distributed.figures", "distributed.model", "distributed.ranks",
        "distributed.tables", "distributed.times", "distributed.volume",
    },
    "training.transformer": set(),
    "training.loop": {"training.transformer"},
    "training.tolerances": {"plots", "report", "training.loop", "training.transformer"},
    "training.train": {"plots", "report", "training.loop", "training.tolerances", "training.transformer"},
    "collapse.fidelity": set(),
    "collapse.published": set(),
    "collapse.corpus": set(),
    "collapse.engine": {"report"},
    "collapse.groups": {"report", "collapse.engine", "collapse.fidelity"},
    "collapse.decoding": {"training.transformer"},
    "collapse.gaussian": {"collapse.engine", "collapse.fidelity", "collapse.groups"},
    "collapse.categorical": {"collapse.corpus", "collapse.engine", "collapse.groups"},
    "collapse.gmm": {"collapse.engine"},
    "collapse.vae": {"report", "collapse.engine"},
    "collapse.measures": {"training.transformer", "collapse.corpus", "collapse.groups"},
    "collapse.lm": {
        "report", "training.transformer", "collapse.corpus", "collapse.decoding", "collapse.engine",
        "collapse.measures",
    },
    "collapse.figures": {
        "plots", "collapse.categorical", "collapse.fidelity", "collapse.gaussian", "collapse.gmm", "collapse.groups",
        "collapse.lm", "collapse.measures", "collapse.published",
    },
    "collapse.summary": {
        "report", "collapse.categorical", "collapse.fidelity", "collapse.figures", "collapse.gaussian", "collapse.gmm",
        "collapse.groups", "collapse.lm", "collapse.measures", "collapse.published", "collapse.vae",
    },
    "collapse.command": {
        "report", "collapse.categorical", "collapse.engine", "collapse.gaussian", "collapse.gmm", "collapse.lm",
        "collapse.summary", "collapse.vae",
    },
}  # fmt: skip


def modules_of(package):
    """Paths by dotted names, as from inside the package."""
    return {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}


def imported_modules(name, modules):
    """What a module imports of its own package, names that packages define in their __init__ aside."""
    for node in ast.walk(ast.parse(modules[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            origin = name.split(".")[: -node.level] + (node.module or "").split(".")
            origin = ".".join(filter(None, origin))
            if origin in modules:
                yield origin
            else:
                yield from {f"{origin}.{alias.name}".lstrip(".") for alias in node.names} & set(modules)


@pytest.mark.parametrize("package, allowed", [("tce_kernels", ALLOWED), ("benchmarks", BENCHMARKS)])
def test_imports_point_one_way(package, allowed):
    modules = modules_of(ROOT / package)
    rooms = {name for name in modules if name.endswith("__init__")} - set(allowed)  # which import nothing
    assert set(modules) - rooms == set(allowed)
    for module in modules:
        assert set(imported_modules(module, modules)) <= allowed.get(module, set()), module
    for module in allowed:
        assert module not in reached_from(module, allowed), f"{module} leads back to itself"


INTEGRATIONS = sorted((ROOT / "tce_kernels" / "integrations").glob("*.py"))


@pytest.mark.parametrize("path", INTEGRATIONS, ids=lambda path: path.stem)
def test_integrations_know_public_names_only(path):
    """So that they could live elsewhere; and the package, which the table above holds to itself, does not know them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("tce_kernels") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level < 2, "must be imported from tce_kernels, not by dots"
            if not node.level and node.module.startswith("tce_kernels"):
                assert node.module == "tce_kernels"
                assert {alias.name for alias in node.names} <= set(tce_kernels.__all__)


def reached_from(module, allowed):
    """All modules that its imports lead to."""
    found, todo = set(), [module]
    while todo:
        new = allowed[todo.pop()] - found
        found |= new
        todo += new
    return found


def run(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_without_triton():
    """Blocked, as if it were not installed: the package imports, the CPU works, and asking for triton says so."""
    done = run("""if True:
        import sys
        sys.modules["triton"] = None
        import torch, tce_kernels
        logits = torch.randn(3, 5, requires_grad=True)
        tce_kernels.truncated_cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
        try:
            tce_kernels.truncated_cross_entropy(logits, torch.tensor([0, 1, 2]), backend="triton")
        except ImportError as error:
            print(error)
    """)
    assert done.returncode == 0, done.stderr
    assert "backend='triton' needs the package triton" in done.stdout
    assert "pass backend='torch'" in done.stdout


def test_installing_does_not_bring_a_triton():
    """Which would overwrite the one that torch has brought, if that is AMD's: only two extras that say so do."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = (
        project["dependencies"] + project["optional-dependencies"]["test"] + project["optional-dependencies"]["bench"]
    )
    assert not {"triton", "liger-kernel", "cut-cross-entropy"} & {re.match(r"[\w-]+", name)[0] for name in needed}


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_triton_without_a_gpu_and_without_the_interpreter():
    done = run("""if True:
        import os
        os.environ.pop("TRITON_INTERPRET", None)
        import torch, tce_kernels
        logits = torch.randn(3, 5)
        try:
            tce_kernels.truncated_cross_entropy(logits, torch.tensor([0, 1, 2]), backend="triton")
        except RuntimeError as error:
            print(error)
    """)
    assert done.returncode == 0, done.stderr
    assert "backend='triton' needs logits on a GPU, got cpu" in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout


def test_import_is_quick_and_touches_no_device():
    """It takes a part of torch's time; most of that is torch.utils.flop_counter's, which loads triton."""
    done = run("""if True:
        import sys, time
        start = time.process_time()
        import torch
        torch_seconds = time.process_time() - start
        start = time.process_time()
        import tce_kernels
        seconds = time.process_time() - start
        assert seconds < torch_seconds / 2, (seconds, torch_seconds)
        assert not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in sys.modules)
        assert "tce_kernels.triton_ops" not in sys.modules
        assert not torch.cuda.is_initialized()
    """)
    assert done.returncode == 0, done.stderr


def readme_blocks():
    """Those that run in one process, and those that torchrun starts."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [b for b in blocks if "init_process_group" not in b], [b for b in blocks if "init_process_group" in b]


def test_the_code_of_the_readme_runs():
    """In order, in one namespace, as a reader would paste it."""
    blocks, _ = readme_blocks()
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no torch.distributed")
@pytest.mark.parametrize("example", readme_blocks()[1])
def test_the_examples_for_torchrun_run(example, tmp_path):
    """As written, on two processes, which say the same of what is the same on all ranks."""
    script = tmp_path / "example.py"
    script.write_text(example)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    said = dict(re.findall(r"rank (\d): \w+ ([\d.]+)", done.stdout))
    assert set(said) == {"0", "1"} and said["0"] == said["1"]


TREES = {"README.md": ROOT, "benchmarks/README.md": ROOT / "benchmarks", "tests/README.md": ROOT / "tests"}


def test_the_readmes_name_all_files_and_no_others():
    """Of each tree, a line has one file or more, then two spaces and what is in them."""
    named = set()
    for readme, root in TREES.items():
        tree = re.search(r"```text\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL).group(1)
        folder = root
        for line in tree.splitlines():
            if line.endswith("/"):
                folder = root / line
                assert folder.is_dir(), line
            else:
                folder = folder if line.startswith(" ") else root
                named |= {folder / name for name in line.strip().partition("  ")[0].split(", ")}
    assert not [path for path in named if not path.exists()]
    sources = {path for folder in ("tce_kernels", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")}
    assert {path for path in sources - named if path.name != "__init__.py"} <= {ROOT / "tests/conftest.py"}


def chapter(readme, heading):
    return re.search(rf"\n## {heading}\n(.*?)(\n##+ |$)", (ROOT / readme).read_text(), re.DOTALL).group(1)


def test_the_headline_figures_are_those_of_the_tables():
    headlines = chapter("README.md", "What has been measured, and what has not")
    figures = set(re.findall(r"\d[\d.]*\d", headlines))
    assert len(figures) > 10
    assert figures <= set(re.findall(r"\d[\d.]*\d", (ROOT / "benchmarks/README.md").read_text()))
