"""Benchmarks: `python -m benchmarks --help` says which there are."""

import os

# Both are read when torch is imported. OpenMP threads that spin while they wait make small operations many times
# slower as soon as another process wants a core, so times would depend on who else is there.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The profiler that counts memory prints a line per run otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

INTERRUPTED = 130  # exit status after Ctrl-C
UNAVAILABLE = 3  # exit status of a subcommand that cannot do without something, and has said what it lacks
