"""Table 3, run by papermill as a user would, and the ways to get a parameter wrong."""

import json

import pandas as pd
import pytest

from test_tables import RESULT_FILES, check_refused, papermill

STUDENTS = ["convnext_ln", "convnext_aligned", "vit_ln", "vit_aligned", "vit_cached"]


@pytest.fixture(scope="module")
def run(repo, tmp_path_factory):
    base = tmp_path_factory.mktemp("table3")
    return base / "table3", papermill(repo, "table3", base / "out.ipynb", "-f", repo / "params/smoke/table3.yaml")


def test_a_smoke_run_succeeds_and_leaves_its_results(run):
    folder, done = run
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p.name for p in folder.iterdir()} == RESULT_FILES
    claims = json.loads((folder / "claims.json").read_text())
    assert len(claims) == 12 == len({c["id"] for c in claims}) and all(c["id"].startswith("table3.") for c in claims)
    # one seed decides nothing; what is exact holds
    assert {c["id"] for c in claims if c["verdict"] != "inconclusive"} == {"table3.floor"}


def test_records_tell_the_students_apart(run):
    records = pd.read_csv(run[0] / "records.csv").set_index("network")
    assert list(records.index) == STUDENTS and set(records.seed) == {0} and records.data_free.all()
    plain = ["convnext_ln", "vit_ln"]
    assert records.correlation.isna().tolist() == [n in plain for n in STUDENTS]  # an answer that never moves has none
    assert (records.flip_rate[plain] == 0).all() and (records.cs[plain] == records.alone[plain]).all()
    assert records.floor.nunique() == 1 and (records.context_loss[plain] >= records.floor[plain]).all()
    assert records.loss.nunique() == 5


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("vit", "vit_tniy", "did you mean 'vit_tiny'"),
        ("teacher", "convnext_small", "needs a teacher with BatchNorm"),
        ("target_contexts", "0", "target_contexts"),
        ("target_context", "3", "did you mean 'target_contexts'"),
    ],
)
def test_bad_parameters_fail_at_once_in_one_sentence(repo, tmp_path, name, value, words):
    check_refused(repo, tmp_path, "table3", ["-p", name, value], words)
