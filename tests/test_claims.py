"""The ledger of claims: as strict as it says, and as published."""

import json
import shutil

import pytest

from nskd.experiments.claims import (
    combine,
    count_verdicts,
    ledger_page,
    markdown_ledger,
    markdown_runs,
    published_dir,
    read_runs,
)
from test_tables import check_refused, check_smoke_results, papermill, smoke_runs


@pytest.fixture(scope="module")
def run(repo, tmp_path_factory):
    base = tmp_path_factory.mktemp("claims")
    return base, smoke_runs(repo, base, ["claims"])


@pytest.fixture
def published():
    return json.loads((published_dir() / "claims.json").read_text())


def test_smoke_run_leaves_its_results(run):
    base, done = run
    check_smoke_results(base, done, "claims", 21)
    ledger = json.loads((base / "claims.json").read_text())
    assert len(ledger["claims"]) >= 40 and [c["number"] for c in ledger["claims"]] == list(
        range(1, len(ledger["claims"]) + 1)
    )
    assert ledger["counts"] == count_verdicts(ledger["claims"]) and sum(ledger["counts"].values()) == len(
        ledger["claims"]
    )


def test_every_verdict_is_that_of_its_checks(run):
    checks = {(r.name, c["id"]): c["verdict"] for r in read_runs(["digits"]) for c in r.checks}
    checks |= {("claims", c["id"]): c["verdict"] for c in json.loads((run[0] / "claims/claims.json").read_text())}
    lines = json.loads((run[0] / "claims.json").read_text())
    for line in lines["claims"]:
        assert line["verdict"] == combine(checks[c["run"], c["id"]] for c in line["checks"]), line["number"]
    named = {(c["run"], c["id"]) for line in lines["claims"] + lines["ours"] for c in line["checks"]}
    assert named == set(checks)  # nothing is left out


def test_only_what_is_not_published_may_be_absent(repo):
    cells = json.loads((repo / "nbs/claims.ipynb").read_text())["cells"]
    (parameters,) = ("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    names = {}
    exec(parameters, names)
    there = {c["id"].split(".")[0] for r in read_runs(["digits"]) for c in r.checks}
    assert not there & set(names["absent"].split(",")), "these are published: take them out of `absent`"


def test_the_published_ledger_is_that_of_the_published_runs(published):
    now = {(r.name, c["id"]): (c["verdict"], r.commit) for r in read_runs(["digits"]) for c in r.checks}
    for line in published["claims"] + published["ours"]:
        commit = {r["name"]: r["commit"] for r in line["runs"]}
        for c in line["checks"]:
            if c["run"] != "claims":
                assert (c["verdict"], commit[c["run"]]) == now[c["run"], c["id"]], (
                    f"{c['id']}: run claims.ipynb again, and publish it"
                )


def test_the_readme_leads_to_the_published_ledger(repo, published):
    readme, page = (repo / "README.md").read_text(), repo / "outputs/published/digits/claims/ledger.md"
    assert (
        page.read_text() == ledger_page(published)
        and markdown_ledger(published["claims"], up="../../../../") in page.read_text()
    ), "publish the ledger again"
    counts = ", ".join(f"{verdict} {n}" for verdict, n in count_verdicts(published["claims"]).items())
    assert f"({page.relative_to(repo)})" in readme and f"{len(published['claims'])} claims: {counts}." in readme, (
        "run index.ipynb again, then `make readme`"
    )
    assert markdown_runs(read_runs(["digits"]), up="") in readme, "run index.ipynb again, then `make readme`"


def test_fresh_runs_are_read_from_outputs(repo, tmp_path):
    shutil.copytree(published_dir() / "digits/table7", tmp_path / "table7")
    (tmp_path / "published").mkdir()
    shutil.copy(published_dir() / "claims.json", tmp_path / "published")  # as in outputs/
    done = papermill(
        repo,
        "claims",
        tmp_path / "out.ipynb",
        "-f",
        repo / "params/smoke/claims.yaml",
        "-p",
        "source",
        "fresh",
        "-p",
        "absent",
        "all",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ledger = json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert {r["link"] for line in ledger for r in line["runs"]} == {"outputs/table7", "outputs/claims.ipynb"}
    assert all(line["verdict"] == "not tested" for line in ledger if not line["runs"]) and any(
        line["runs"] for line in ledger
    )


@pytest.mark.parametrize(
    "args, words",
    [
        (["-p", "tiers", "digist"], "a published tier must be one of digits, not 'digist', did you mean 'digits'?"),
        (["-p", "source", "fresh"], "there are no fresh runs of digits in"),
        (["-p", "absnt", "all"], "did you mean 'absent'?"),
    ],
)
def test_bad_parameters_fail_at_once_in_one_sentence(repo, tmp_path, args, words):
    check_refused(repo, tmp_path, "claims", args, words)
