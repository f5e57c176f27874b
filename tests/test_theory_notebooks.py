"""Theory, Table 8 and Table 9, run by papermill as a user would."""
import json
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest

from test_tables import papermill

pytestmark = pytest.mark.filterwarnings("ignore")
NOTEBOOKS = {"theory": 29, "table8": 16, "table9": 9}            # claims in each


@pytest.fixture(scope="module")
def runs(repo, tmp_path_factory):
    "All three at the smoke tier; the tables share their networks and measurements."
    base = tmp_path_factory.mktemp("theory")
    def run(names): return [(n, papermill(repo, n, base/f"{n}.ipynb", "-f", repo/f"params/smoke/{n}.yaml")) for n in names]
    with ThreadPoolExecutor(2) as pool: return base, dict(sum(pool.map(run, (["theory"], ["table8", "table9"])), []))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_smoke_run_leaves_its_results(runs, name):
    base, done = runs
    assert done[name].returncode == 0, done[name].stderr[-2000:]
    assert {p.name for p in (base/name).iterdir()} == {"records.csv", "table.csv", "claims.json", "results.json", "figure.png"}
    claims = json.loads((base/name/"claims.json").read_text())
    assert len(claims) == NOTEBOOKS[name] == len({c["id"] for c in claims}) and all(c["id"].startswith(name + ".") for c in claims)
    assert {c["verdict"] for c in claims} <= {"holds", "fails", "inconclusive"}
    assert (base/f"{name}.ipynb").stat().st_size < 300_000


def test_what_does_not_depend_on_training_has_its_verdict_at_once(runs):
    verdict = {c["id"]: c["verdict"] for c in json.loads((runs[0]/"theory/claims.json").read_text())}
    for id in ("lemma-7.1-moments", "lemma-7.1-conditional", "lemma-b1", "weight-bounds", "shift-rs", "shift-layers", "shift-cs", "prop-5.1-finite", "prop-5.1-zero"):
        assert verdict[f"theory.{id}"] == "holds", id
    for id in ("a1-holds-untrained", "a1-holds-trained", "shift-cs-any-input"): assert verdict[f"theory.{id}"] == "fails", id


def test_table_9_measures_nothing_that_table_8_has_measured(runs):
    a, b = (pd.read_csv(runs[0]/t/"records.csv") for t in ("table8", "table9"))
    assert b.cached.all()
    pd.testing.assert_frame_equal(a.drop(columns=["cached"]), b.drop(columns=["cached"]))


@pytest.mark.parametrize("name, args, words", [
    ("table8", ["-p", "models", "wrn16"], "has no attention layers"),
    ("table8", ["-p", "image_size", "32"], "image_size goes with weights='pretrained'"),
    ("theory", ["-p", "sigmma", "1"], "did you mean 'sigma'?"),
])
def test_bad_parameters_fail_in_one_sentence(repo, tmp_path, name, args, words):
    done = papermill(repo, name, tmp_path/"out.ipynb", "-f", repo/f"params/smoke/{name}.yaml", *args, outputs=tmp_path/"results")
    assert done.returncode != 0 and words in done.stderr, done.stderr[-1500:]
