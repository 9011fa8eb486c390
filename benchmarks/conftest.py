"""`pytest benchmarks`: the memory that timing/bench_losses.py counts, below the times that pytest-benchmark prints."""


def pytest_terminal_summary(terminalreporter):
    measured = [
        (dict(report.user_properties)["extra_peak_MiB"], report.nodeid.rpartition("::")[2])
        for report in terminalreporter.getreports("passed")
        if report.user_properties
    ]
    if measured:
        terminalreporter.section("peak memory beyond inputs and returned gradients")
        for mebibytes, name in measured:
            terminalreporter.line(f"{mebibytes:10.1f} MiB  {name}")
