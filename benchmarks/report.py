"""What every benchmark prints and saves: the line that names the machine, tables, CSV files."""

import csv
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import tabulate
import torch

ROOT = Path(__file__).parent
tabulate.PRESERVE_WHITESPACE = True  # or numbers without a star would not stand below those with one


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> str:
    """One line: device, versions, threads, precision, commit. A figure without it means nothing."""
    return (
        f"{_device_name(device)} | Python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {version('triton') or 'not installed'} | {torch.get_num_threads()} threads | "
        f"float32 matmuls: {torch.get_float32_matmul_precision()} precision | commit {commit()}"
    )


def version(distribution: str) -> str | None:
    """None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def results_path(device: torch.device, name: str, partial: bool) -> Path:
    """results/<device>/<name> next to this file, or .../quick/<name>, which git ignores; the folder exists."""
    slug = "cpu" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "-", _device_name(device).lower()).strip("-")
    path = ROOT / "results" / slug / ("quick" if partial else "") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def as_text(table: list[dict], markdown: bool = False) -> str:
    """The first column to the left, the others to the right."""
    aligned = ["left"] + ["right"] * (len(table[0]) - 1)
    style = "github" if markdown else "simple"
    return tabulate.tabulate(table, headers="keys", tablefmt=style, colalign=aligned, disable_numparse=True)


def publish(path: Path, heading: list[str], rows: list[dict], table: list[dict]) -> None:
    """Print `table`; write `rows`, after the heading as comments, to the CSV file `path`."""
    print(as_text(table))
    save(path, heading, rows)
    announce(path)


def announce(path: Path) -> None:
    print(f"Saved {path.relative_to(ROOT.parent)}")


def save(path: Path, heading: list[str], rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in heading)
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def load(path: Path) -> tuple[list[str], list[dict]]:
    """Heading and rows of a saved file, with numbers and truth values as such."""
    lines = path.read_text().splitlines()
    heading = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    rows = csv.DictReader(lines[len(heading) :])
    return heading, [{name: _parsed(text) for name, text in row.items()} for row in rows]


def _parsed(text: str) -> bool | int | float | str:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is checked out, with "-dirty" if its files have changed, results aside."""
    try:
        name = _git("rev-parse", "--short=10", "HEAD")
        return name + ("-dirty" if _git("status", "--porcelain", "-uno", ":/", ":!results") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
