"""Notebooks that run out of time: what is finished is shown, the rest is named, nothing is decided, and the next run
goes on to the same numbers.
"""

import json
import shutil

import pandas as pd
import pytest

from test_tables import run_here

CLAIMS = {
    "table11": 5,
    "figure1": 6,
    "table9": 0,
}  # a sweep of students, a study of teachers, measurements from the cache; of the last none without a network


def unfinished(done, outputs, name, claims):
    "What is lacking, after a check that all that was said and written is what it should be."
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((outputs / name / "results.json").read_text())
    found = json.loads((outputs / name / "claims.json").read_text())
    assert len(found) == claims and all(
        c["verdict"] == "inconclusive" and "not there yet" in c["evidence"]["unfinished"] for c in found
    )
    assert "**unfinished**" in (outputs / name / "summary.md").read_text()
    said = "".join(
        "".join(o["text"])
        for c in json.loads((outputs / f"{name}.ipynb").read_text())["cells"]
        for o in c.get("outputs", [])
        if o.get("name") == "stdout"
    )
    assert all(lack in said for lack in results["unfinished"])
    return results["unfinished"]


@pytest.fixture(scope="module", params=CLAIMS)
def run(request, repo, tmp_path_factory):
    "A notebook at the smoke tier from nothing: without time, then to its end."
    name, base = request.param, tmp_path_factory.mktemp(request.param)

    def again(*args):
        return run_here(repo, name, base / f"{name}.ipynb", "-f", repo / f"params/smoke/{name}.yaml", *args)

    lacks = unfinished(again("-p", "budget_seconds", "1e-9"), base, name, CLAIMS[name])
    done = again()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "unfinished" not in json.loads((base / name / "results.json").read_text())
    return name, base, lacks


def test_a_run_without_time_names_all_and_shows_nothing_wrong(run):
    name, base, lacks = run
    assert len(lacks) == {"table11": 2, "figure1": 2, "table9": 2}[name] and all(
        "not trained" in lack for lack in lacks
    )


def test_a_run_that_lost_some_shows_the_others_and_ends_with_the_same_numbers(run, repo, tmp_path):
    name, base, lacks = run
    outputs = shutil.copytree(base, tmp_path / "outputs")
    kind = {"table11": "distil", "figure1": "teachers", "table9": "teachers"}[name]
    shutil.rmtree(sorted((outputs / kind).iterdir())[0])
    late = run_here(
        repo, name, outputs / f"{name}.ipynb", "-f", repo / f"params/smoke/{name}.yaml", "-p", "budget_seconds", "1e-9"
    )
    claims = (
        len(json.loads((base / name / "claims.json").read_text()))
        if name != "table9"
        else len(json.loads((outputs / name / "claims.json").read_text()))
    )
    assert len(unfinished(late, outputs, name, claims)) == 1
    whole, part = pd.read_csv(base / name / "records.csv"), pd.read_csv(outputs / name / "records.csv")
    value = {"table11": "cs", "figure1": "effective_classes", "table9": "spread"}[name]
    assert 0 < part[value].notna().sum() < whole[value].notna().sum() and set(part[value].dropna()) <= set(whole[value])
    assert run_here(repo, name, outputs / f"{name}.ipynb", "-f", repo / f"params/smoke/{name}.yaml").returncode == 0
    again = pd.read_csv(outputs / name / "records.csv").drop(
        columns=["seconds", "directory", "cached"], errors="ignore"
    )
    pd.testing.assert_frame_equal(
        again, whole.drop(columns=["seconds", "directory", "cached"], errors="ignore"), check_exact=True
    )
