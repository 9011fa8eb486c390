"""What the compiled kernels need and cost on GPUs that are not there, next to Liger-Kernel's: no GPU takes part.

Every kernel variant is compiled for every target. Registers, spills, stack and shared memory come from the compiler,
occupancy from them, the work per logit from the disassembly. The floor is the least time that a published figure of
the GPU allows: bytes / bandwidth, instructions / issue rate or special functions / their rate, whichever is longest.
It is a model and no measurement.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from .. import INTERRUPTED, UNAVAILABLE, report
from .cases import cases
from .devices import (
    DEVICES,
    LIMITS,
    TARGETS,
    Device,
    blocks_per_multiprocessor,
    floor,
    rows_in_flight,
    stay_in_cache,
)

RESULTS = report.ROOT / "results"
PROCESSES = 2
WORK = [
    f"{what}_{row}" for row in ("kept", "dropped") for what in ("instructions", "special_functions")
] + [
    f"{loop}_loop_{what}"
    for loop in ("sweep", "gradient")
    for what in ("instructions", "special_functions", "barriers")
]  # fmt: skip


def compile_all(targets: list[str], options: list[str], n_cases: int) -> list[dict]:
    """Launches of all targets, two of which compile side by side."""
    from .compiled import compile_for

    processes = []
    with (
        tqdm(total=len(targets) * n_cases, unit="case", leave=False) as progress,
        ThreadPoolExecutor(PROCESSES) as pool,
    ):
        futures = [pool.submit(compile_for, target, options, processes, progress.update) for target in targets]
        try:
            return [launch for future in futures for launch in future.result()]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):
                for process in processes:
                    process.terminate()
                time.sleep(0.1)
            raise


def as_row(launch: dict) -> dict:
    """A launch as a line of codegen.csv; what is not known is "-"."""
    blocks = blocks_of(launch)
    work = launch.get("work", {})
    described = [
        "target", "provider", "path", "phase", "kernel", "layout", "N", "V", "dtype", "flags", "grid", "constants",
        "options",
    ]  # fmt: skip
    row = {name: flat(launch[name]) for name in described}
    needs = ["registers", "scalar_registers", "spills", "stack", "shared", "loads", "stores"]
    row |= {name: flat(launch.get(name)) for name in needs}
    row |= {"blocks_per_multiprocessor": blocks, "warps_per_multiprocessor": blocks * launch["warps"]}
    return row | {f"{name}_per_logit".replace("barriers_per_logit", "barriers"): flat(work.get(name)) for name in WORK}


def flat(value) -> str | int:
    """A cell of a CSV file."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return " ".join(f"{name}={x}" for name, x in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return round(value, 3) if isinstance(value, float) else value


def blocks_of(launch: dict) -> int:
    return blocks_per_multiprocessor(launch["target"], launch["warps"], launch["registers"], launch["shared"])


def bytes_per_logit(launch: dict, device: Device) -> dict[str, int]:
    """Device memory: a read in the sweep; for the gradient a write, and a read unless the row is still in the cache."""
    item = 4 if launch["dtype"] == "float32" else 2
    sweeps, writes = (launch["work"][f"{loop}_loop_instructions"] is not None for loop in ("sweep", "gradient"))
    rows = rows_in_flight(device, blocks_of(launch), launch["grid"][0])
    cached = sweeps and stay_in_cache(device, rows, launch["V"] * item)
    reads_again = writes and not cached
    dropped = item * (sweeps + writes)
    kept = dropped + item * reads_again
    return {"kept": kept, "dropped": kept if launch["provider"] != "tce_kernels" else dropped}


def modelled(launches: list[dict]) -> list[dict]:
    """A line per GPU, provider, path and V, in which launches that follow each other add up."""
    found = []
    for device in DEVICES:
        groups = {}
        for launch in launches:
            # The backward of the first path scales by a factor of 1, which touches nothing.
            counts = launch["phase"] == "forward" or launch["path"] == "gradient in backward"
            if launch["target"] == device.target and launch["core"] and "work" in launch and counts:
                groups.setdefault((launch["path"], launch["V"], launch["provider"]), []).append(launch)
        for (path, V, provider), group in groups.items():
            row = {"GPU": device.name, "path": path, "V": V, "dtype": group[0]["dtype"], "provider": provider}
            row |= {"registers": "+".join(str(launch["registers"]) for launch in group)}
            row |= {"warps_per_multiprocessor": "+".join(str(blocks_of(launch) * launch["warps"]) for launch in group)}
            for kind in ("kept", "dropped"):
                row |= costs(group, device, kind)
            found.append(row)
    return found


def costs(group: list[dict], device: Device, kind: str) -> dict:
    bytes_ = [bytes_per_logit(launch, device)[kind] for launch in group]
    instructions = [launch["work"][f"instructions_{kind}"] for launch in group]
    special = [launch["work"][f"special_functions_{kind}"] for launch in group]
    floors = [floor(device, *each) for each in zip(bytes_, instructions, special, strict=True)]
    return {
        f"bytes_per_logit_{kind}": sum(bytes_),
        f"instructions_per_logit_{kind}": round(sum(instructions), 3),
        f"special_functions_per_logit_{kind}": round(sum(special), 3),
        f"floor_us_per_million_logits_{kind}": round(sum(max(each) for each in floors), 4),
        f"bound_{kind}": "+".join(each.bound for each in floors),
    }


def resource_table(launches: list[dict]) -> list[dict]:
    """A line per target and provider."""
    groups = {}
    for launch in launches:
        groups.setdefault((launch["target"], launch["provider"]), []).append(launch)
    table = []
    for (target, provider), group in groups.items():
        described = ("kernel", "dtype", "constants", "loads", "stores", "registers")
        variants = {json.dumps([launch[name] for name in described]) for launch in group}
        registers = [launch["registers"] for launch in group]
        warps = [blocks_of(launch) * launch["warps"] for launch in group]
        table.append(
            {
                "target": target,
                "provider": provider,
                "launches": len(group),
                "variants": len(variants),
                "registers": f"{min(registers)} - {max(registers)}",
                "spilling": sum(launch["spills"] > 0 for launch in group),
                "most stack": max(launch["stack"] for launch in group),
                "most shared": max(launch["shared"] for launch in group),
                "resident warps": f"{min(warps)} - {max(warps)} of {LIMITS[target].warps}",
            }
        )
    return table


def core_table(rows: list[dict], path: str) -> list[dict]:
    """GPUs and vocabularies down, figures across; in a cell ours, then Liger-Kernel's if it is there."""
    columns = {
        "registers": "registers",
        "warps": "warps_per_multiprocessor",
        "instructions": "instructions_per_logit_kept",
        "dropped": "instructions_per_logit_dropped",
        "special": "special_functions_per_logit_kept",
        "bytes": "bytes_per_logit_kept",
        "dropped ": "bytes_per_logit_dropped",
        "floor": "floor_us_per_million_logits_kept",
        "dropped  ": "floor_us_per_million_logits_dropped",
        "bound by": "bound_kept",
    }
    groups = {}
    for row in rows:
        if row["path"] == path:
            groups.setdefault((row["GPU"], row["V"]), []).append(row)
    return [
        {path: gpu, "V": V} | {title: " / ".join(short(row[name]) for row in group) for title, name in columns.items()}
        for (gpu, V), group in groups.items()
    ]


def short(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show(table: list[dict]) -> None:
    print(tabulate(table, headers="keys", disable_numparse=True), end="\n\n")


def compiler_versions() -> str:
    import triton

    found = [f"triton {report.version('triton')}"]
    for tool in sorted((Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*")):
        said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
        found.append(f"{tool.name} {re.search(r'V([0-9.]+)', said)[1]}")
    found.append(f"torch {report.version('torch')}")
    found.append(f"liger-kernel {report.version('liger-kernel') or 'not installed'}")
    return f"{', '.join(found)} | commit {report.commit()}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks codegen", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="sm_90 only, and only what users launch most")
    args = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed: there is no compiler for the kernels, so codegen has nothing to report")
        return UNAVAILABLE

    targets = ["sm_90"] if args.quick else TARGETS
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    options = ["--core"] * args.quick + ["--liger"] * has_liger
    heading = [compiler_versions(), f"compiled for {', '.join(targets)}; nothing was run on a GPU"]
    print(*heading, sep="\n", end="\n\n")
    try:
        launches = compile_all(targets, options, len(cases(args.quick, has_liger)))
    except KeyboardInterrupt:
        print("Interrupted: nothing was saved")
        return INTERRUPTED

    devices = [device for device in DEVICES if device.target in targets]
    show([device._asdict() for device in devices])
    show(resource_table(launches))
    floors = modelled(launches)
    for path in dict.fromkeys(row["path"] for row in floors):
        show(core_table(floors, path))
    print("Resident warps of a multiprocessor; per logit of a kept row, then of a dropped one: thread-instructions,")
    print("special-function operations, bytes of device memory; modelled floor in us per million logits.")
    print("In a cell: tce_kernels / Liger-Kernel." if has_liger else "Liger-Kernel: not installed")
    folder = RESULTS / ("quick" if args.quick else "")
    folder.mkdir(parents=True, exist_ok=True)
    report.save(folder / "codegen.csv", heading, [as_row(launch) for launch in launches])
    report.save(folder / "codegen_floors.csv", heading + [str(device) for device in devices], floors)
    print(f"Saved codegen.csv and codegen_floors.csv in {folder.relative_to(report.ROOT.parent)}")
    return 0
