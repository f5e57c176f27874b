"""The notebooks that look at teachers at the smoke tier, and the ways to get a parameter wrong."""

import pandas as pd
import pytest

from test_tables import check_refused, check_smoke_results

CLAIMS = {"figure1": 6, "figure4": 6, "table7": 6, "table12": 13}


@pytest.mark.parametrize("name", CLAIMS)
def test_smoke_runs_succeed_and_leave_their_results(smoke, name):
    base, done = smoke
    check_smoke_results(base, done, name, CLAIMS[name])
    assert set(pd.read_csv(base / name / "records.csv").seed) == ({0} if name == "table12" else {0, 1})


@pytest.mark.parametrize(
    "name, args, words",
    [
        ("figure4", ["-p", "teacher", "convnext_small"], "needs a teacher with BatchNorm"),
        ("table7", ["-p", "dataset", "digits", "-p", "samples", "5"], "5 samples can't cover 10 classes"),
    ],
)
def test_bad_parameters_fail_at_once_in_one_sentence(repo, tmp_path, name, args, words):
    check_refused(repo, tmp_path, name, args, words)
