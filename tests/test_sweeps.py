"""The notebooks that vary one thing at a time at the smoke tier, and the ways to get a parameter wrong."""

import pandas as pd
import pytest

from test_tables import check_refused, check_smoke_results

CLAIMS = {"table1": 7, "table5": 14, "table6": 7, "table11": 5, "figure2": 8, "protocol": 7}


@pytest.mark.parametrize("name", CLAIMS)
def test_smoke_runs_succeed_and_leave_their_results(smoke, name):
    base, done = smoke
    claims = check_smoke_results(base, done, name, CLAIMS[name])
    assert {c["verdict"] for c in claims} == {"inconclusive"}  # one seed decides nothing
    assert set(pd.read_csv(base / name / "records.csv").seed) == {0}


def test_real_images_are_in_the_ledger(smoke):
    records = pd.read_csv(smoke[0] / "table6/records.csv")
    assert (records.data_free == (records.method != "real")).all()


@pytest.mark.parametrize(
    "name, args, words",
    [
        ("table1", ["-p", "fractions", "0,1"], "fractions must hold"),
        ("table5", ["-p", "norms", "bn"], "a norm must be one of ln, gn"),
        ("table5", ["-p", "alphas", "0,0.5,1,1.5"], "between 0 and 1"),
        ("table6", ["-p", "scarce", "60"], "scarce must be one of real_images"),
        ("table11", ["-p", "alpha", "0.5"], "no parameter 'alpha'"),
        ("figure2", ["-p", "noises", "gaussian,pelrin"], "did you mean 'perlin'"),
        ("protocol", ["-p", "ks", "1,2,4"], "two levels"),
    ],
)
def test_bad_parameters_fail_at_once_in_one_sentence(repo, tmp_path, name, args, words):
    check_refused(repo, tmp_path, name, args, words)
