"""The two studies for practitioners, at the smoke tier, and the ways to get a parameter wrong."""

import pandas as pd
import pytest

from test_tables import check_refused, check_smoke_results

CLAIMS = {"track_record": 7, "deployment": 13}


@pytest.mark.parametrize("name", CLAIMS)
def test_smoke_runs_succeed_and_leave_their_results(smoke, name):
    base, done = smoke
    claims = check_smoke_results(base, done, name, CLAIMS[name])
    assert {c["verdict"] for c in claims} == {"inconclusive"}  # one seed decides nothing


def test_a_forecast_stands_beside_every_student(smoke):
    records = pd.read_csv(smoke[0] / "track_record/records.csv")
    assert (
        len(records) == 2 * 6
        and records.score.between(0, 1).all()
        and records.share.notna().all()
        and records.data_free.all()
    )
    assert records[records.way == "ordinary"].asked.eq("rs").all() and records[records.norm == "bn"].asked.tolist() == [
        "cs",
        "rs",
    ]


def test_students_without_batchnorm_have_one_accuracy(smoke):
    records = pd.read_csv(smoke[0] / "deployment/records.csv")
    sized = records[records.share.isna()]
    assert sized[sized.student.isin(["ln", "gn", "gn_leaves"])]["mode"].eq("rs").all()
    assert {
        "rs",
        "cs",
        "recal@10",
        "recal@100",
        "recal@1000",
        "recal@gaussian",
        "recal@perlin",
        "recal@dead_leaves",
    } == set(sized[sized.student == "bn"]["mode"])


@pytest.mark.parametrize(
    "name, args, words",
    [
        ("track_record", ["-p", "others", "r18"], "others are networks with a LayerNorm of their own"),
        ("track_record", ["-p", "alpha", "0.5"], "no parameter 'alpha'"),
        ("deployment", ["-p", "skew_batch", "1"], "skew_batch"),
    ],
)
def test_bad_parameters_fail_at_once_in_one_sentence(repo, tmp_path, name, args, words):
    check_refused(repo, tmp_path, name, args, words)
