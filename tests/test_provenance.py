"""nskd.experiments.explain.explain over everything that is published: the command it prints is papermill's, and gives
the parameters that are recorded.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from papermill.cli import _resolve_type

from nskd.engine.files import notebook_path
from nskd.experiments import explain as runs

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = sorted(p.parent for p in (ROOT / "outputs/published").glob("*/*/results.json"))
pytestmark = pytest.mark.skipif(not PUBLISHED, reason="nothing is published yet")


def parsed(command):
    "What a shell and papermill make of a command: the commit, the notebook's name, where to, {parameter: value}."
    checkout, run = command.split(" && ")
    (git, verb, commit), (tool, notebook, output, *options) = shlex.split(checkout), shlex.split(run)
    assert (git, verb, tool) == ("git", "checkout", "papermill")
    given, words = {}, iter(options)
    for option in words:
        if option == "-y":
            given |= yaml.safe_load(next(words))
        else:
            given |= {next(words): {"-p": _resolve_type, "-r": str}[option](next(words))}
    return commit, notebook, output, given


def parameters_of(notebook):
    "A notebook's own parameters: {name: default}."
    (cell,) = (c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))
    names = {}
    exec("".join(cell["source"]), {}, names)
    return names


def in_json(recorded, value):
    "A value as the checked parameters keep it: names in a string or a list, tuples as lists."
    if isinstance(recorded, list) and not isinstance(value, (list, tuple)):
        return [v.strip() for v in value.split(",")] if isinstance(value, str) else [value]
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_the_command_gives_the_recorded_parameters(folder):
    results = json.loads((folder / "results.json").read_text())
    (told,) = runs.explain(folder)
    commit, notebook, output, given = parsed(told["command"])
    assert (
        commit == results["provenance"]["commit"]
        and output == f"outputs/{folder.name}.ipynb"
        and notebook_path(Path(notebook).stem, ROOT).exists()
    )
    executed = json.loads((folder / "executed.ipynb").read_text())
    defaults = parameters_of(executed)
    assert set(given) <= set(defaults), "papermill passes over a name that the notebook has not"
    assert not [
        k for k, v in given.items() if in_json(results["parameters"][k], defaults[k]) == results["parameters"][k]
    ], "only what differs"
    for name, recorded in results["parameters"].items():
        # a name without a cell of its own is the library's default
        if name in defaults:
            assert in_json(recorded, given.get(name, defaults[name])) == recorded, name


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_every_file_of_a_run_leads_to_its_provenance(folder):
    results = json.loads((folder / "results.json").read_text())
    made = results["provenance"]
    for file in sorted(folder.iterdir()):
        (told,) = runs.explain(file)
        assert told["commit"].startswith(made["commit"]) and ("uncommitted" in told["commit"]) == bool(
            made["uncommitted_changes"]
        )
        assert (
            told["parameters"] == results["parameters"]
            and told["versions"] == made["versions"]
            and told["threads"] == made["threads"]
        )
        assert made["device"] in told["device"] and told["seeds"] and " s for " in told["wall time"] and told["ledger"]


def test_a_cell_of_the_records():
    folder = next(f for f in PUBLISHED if f.name == "table2-wrn28")
    rows = (folder / "records.csv").read_text().splitlines()
    (told,) = runs.explain(f"{folder}/records.csv:3:cs")
    column = rows[0].split(",").index("cs")
    assert (
        told["cs"] == rows[4].split(",")[column]
        and told["row"]["method"] == "normshift"
        and told["run"] == "table2-wrn28"
    )
    free = sum(r.split(",")[rows[0].split(",").index("data_free")] == "True" for r in rows[1:])
    assert told["ledger"].startswith(f"{free} of {len(rows) - 1} students are data-free") and 0 < free
    (all_of_it,) = runs.explain(f"{folder}/records.csv:cs")
    assert all_of_it["cs"].startswith(f"{len(rows) - 1} values, {rows[1].split(',')[column]}")
    assert (
        "data-free; the others" in runs.explain(folder.parent / "table6")[0]["ledger"]
    )  # it has students of real images


def test_claims_lead_to_their_runs():
    base = ROOT / "outputs/published"
    ids = {c["id"] for f in PUBLISHED for c in json.loads((f / "claims.json").read_text())}
    for id in sorted(ids)[::7]:
        assert all(id in told["claim"] for told in runs.explain(id))
    assert {told["run"] for told in runs.explain("table2.cs-repairs")} == {
        f.name for f in PUBLISHED if "table2.cs-repairs" in (f / "claims.json").read_text() and f.name != "claims"
    }
    ledger = json.loads((base / "claims.json").read_text())["claims"]
    for entry in ledger:
        reference = f"{base / 'claims.json'}:{entry['number']}"
        if entry["checks"]:
            assert {t["run"] for t in runs.explain(reference)} == {c["run"] for c in entry["checks"]}
        else:
            with pytest.raises(ValueError, match="not tested"):
                runs.explain(reference)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ("table2.cs-repars", "did you mean 'table2.cs-repairs'"),
        ("nowhere/results.json", "no file and no claim"),
        ("README.md", "no part of a finished run"),
        ("outputs/published/claims.json", "say which"),
        ("outputs/published/claims.json:0", "say which"),
        ("table2-wrn28/records.csv:cz", "did you mean 'cs'"),
        ("table2-wrn28/records.csv:999:cs", "rows 0 to"),
        ("table2-wrn28/records.csv:-1:cs", "rows 0 to"),
        ("table2-wrn28/table.csv:0:cs", "records.csv"),
        ("", "no"),
    ],
)
def test_what_is_no_result_is_said_in_one_sentence(wrong, says, monkeypatch):
    monkeypatch.chdir(ROOT)
    if wrong.startswith("table2-"):
        wrong = str(PUBLISHED[0].parent / wrong)
    with pytest.raises(ValueError, match=re.escape(says)) as e:
        runs.explain(wrong)
    assert "\n" not in str(e.value)


def test_on_the_command_line():
    def call(*words):
        return subprocess.run(
            [sys.executable, "-W", "error::RuntimeWarning", "-m", "nskd.experiments.explain", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    good, bad, usage = call("explain", "outputs/published/digits/table2-r34"), call("explain", "table2.nothing"), call()
    assert good.returncode == 0 and "papermill nbs/table2.ipynb" in good.stdout and not good.stderr
    assert (
        bad.returncode == 1
        and bad.stderr.startswith("error: ")
        and bad.stderr.count("\n") == 1
        and usage.returncode == 2
    )


@pytest.mark.parametrize(
    "value",
    [
        "text",
        "two words",
        "it's",
        "$HOME `x`",
        "12",
        "1e5",
        "None",
        "true",
        "-r",
        "",
        "nan",
        None,
        True,
        3,
        -3,
        0.5,
        -0.5,
        1e-12,
        [1, "a b"],
        {"wrn28": 1.5},
        [[]],
        "ü",
    ],
)
def test_any_value_survives_the_command_line(value, tmp_path):
    "Through papermill's own reading of its options, by way of a shell's."
    from click.testing import CliRunner
    from papermill import cli

    seen = {}

    def execute(**given):
        seen.update(given["parameters"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "execute_notebook", execute)
        done = CliRunner().invoke(cli.papermill, ["in.ipynb", "out.ipynb", *shlex.split(runs._option("x", value))])
    assert done.exit_code == 0, done.output
    assert seen == {"x": value} and type(seen["x"]) is type(value)


def test_links_of_published_pages_lead_somewhere(repo):
    pages = [*(repo / "outputs/published").rglob("executed.ipynb"), *(repo / "outputs/published").rglob("*.md")]
    lost = []
    for page in pages:
        text = (
            page.read_text(encoding="utf-8")
            if page.suffix == ".md"
            else "\n".join(
                "".join(c["source"])
                for c in json.loads(page.read_text(encoding="utf-8"))["cells"]
                if c["cell_type"] == "markdown"
            )
        )
        lost += [
            f"{page.relative_to(repo)}: {target}"
            for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
            if not (page.parent / target).exists()
        ]
    assert pages and not lost
