"""The two studies for practitioners, run by papermill at the smoke tier, and the ways to get a parameter wrong."""
import pandas as pd
import pytest

from test_tables import check_smoke_results, papermill, smoke_runs

CLAIMS = {"track_record": 7, "deployment": 13}


@pytest.fixture(scope="module")
def runs(repo, tmp_path_factory):
    base = tmp_path_factory.mktemp("practice")
    return base, smoke_runs(repo, base, *([name] for name in CLAIMS))


@pytest.mark.parametrize("name", CLAIMS)
def test_smoke_runs_succeed_and_leave_their_results(runs, name):
    base, done = runs
    claims = check_smoke_results(base, done, name, CLAIMS[name])
    assert {c["verdict"] for c in claims} == {"inconclusive"}                         # one seed decides nothing


def test_a_forecast_stands_beside_every_student(runs):
    records = pd.read_csv(runs[0]/"track_record/records.csv")
    assert len(records) == 2 * 6 and records.score.between(0, 1).all() and records.share.notna().all() and records.data_free.all()
    assert records[records.way == "ordinary"].asked.eq("rs").all() and records[records.norm == "bn"].asked.tolist() == ["cs", "rs"]


def test_students_without_batchnorm_have_one_accuracy(runs):
    records = pd.read_csv(runs[0]/"deployment/records.csv")
    sized = records[records.share.isna()]
    assert sized[sized.student.isin(["ln", "gn", "gn_leaves"])]["mode"].eq("rs").all()
    assert {"rs", "cs", "recal@10", "recal@100", "recal@1000", "recal@gaussian", "recal@perlin", "recal@dead_leaves"} == set(sized[sized.student == "bn"]["mode"])


@pytest.mark.parametrize("name, args, words", [
    ("track_record", ["-p", "others", "r18"], "others are networks with a LayerNorm of their own"),
    ("track_record", ["-p", "alpha", "0.5"], "no parameter 'alpha'"),
    ("deployment", ["-p", "skew_batch", "1"], "skew_batch"),
])
def test_bad_parameters_fail_at_once_in_one_sentence(repo, tmp_path, name, args, words):
    done = papermill(repo, name, tmp_path/"out.ipynb", *args, outputs=tmp_path/"results")
    assert done.returncode != 0 and words in done.stderr, done.stderr[-1500:]
    assert not (tmp_path/"results").exists()
