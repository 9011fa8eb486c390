"""All models of the installed transformers, against the committed census: `pytest -m slow`, ten minutes."""

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
for package in ("tabulate", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason="only python -m benchmarks needs it")

from benchmarks import report
from benchmarks.integrations import census


@pytest.mark.slow
def test_the_census_is_the_committed_one():
    heading, rows = report.load(census.PATH)
    found = list(census.take([]))
    assert not [finding for finding in found if finding.verdict == census.WRONG]
    if f"transformers {transformers.__version__} " not in heading[0]:
        pytest.skip(f"nothing is wrong with transformers {transformers.__version__}, but the census is of {heading[0]}")
    verdicts = {(row["mapping"], row["model"]): row["verdict"] for row in rows}
    for finding in found:
        verdict = verdicts.pop((finding.mapping, finding.model), "absent")
        is_missing = finding.reason.startswith("ImportError")  # a package, which the census has had
        assert finding.verdict == verdict or is_missing, finding
    assert not verdicts  # models that are not found any more
