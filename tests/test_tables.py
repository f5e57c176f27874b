"""Table notebooks, run as a user would, by papermill or with its words: a run, a second run, and the ways to get a
parameter wrong.
"""

import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import yaml
from execnb.shell import CaptureShell
from papermill.cli import _resolve_type
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from nskd.engine.files import notebook_path
from nskd.engine.hardware import threads

RESULT_FILES = {"records.csv", "table.csv", "claims.json", "summary.md", "results.json", "figure.png"}

pytestmark = pytest.mark.filterwarnings("ignore")


def papermill(repo, notebook, output, *args, outputs=None):
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {
        "NSKD_OUTPUTS": str(outputs or output.parent),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "papermill", str(notebook_path(notebook, repo)), str(output), *map(str, args)],
        cwd=output.parent,
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def run_here(repo, notebook, output, *args, folder=None, **env):
    """As `papermill`, with the words of its command line and its injected cell, but in this process, as `nbdev_test`
    does it: a kernel would take seconds.
    """
    with pytest.MonkeyPatch.context() as m, threads(1):
        m.setenv("NSKD_OUTPUTS", str(output.parent))
        m.delenv("IN_TEST", raising=False)
        m.chdir(folder or output.parent)
        m.setattr(sys, "path", list(sys.path))
        for name, value in env.items():
            m.setenv(name, value)
        given = notebook_path(notebook, repo)
        if args:
            nbformat.write(
                parameterize_notebook(load_notebook_node(str(given)), parameters(args)),
                given := output.with_name(f"given-{output.name}"),
            )
        try:
            CaptureShell().execute(str(given), str(output), exc_stop=True)
        except Exception as e:
            return SimpleNamespace(returncode=1, stderr="".join(traceback.format_exception(e)))
        finally:
            plt.close("all")
    return SimpleNamespace(returncode=0, stderr="")


def run_smoke(repo, notebook, output):
    "The notebook at the smoke tier, by its own choice under test, kept in `output`."
    return run_here(repo, notebook, output, folder=notebook_path(notebook, repo).parent, IN_TEST="1")


def smoke_runs(repo, base, names):
    "Notebooks at the smoke tier into the folder `base`, one after the other: {name: how it ended}."
    return {n: run_smoke(repo, n, base / f"{n}.ipynb") for n in names}


def check_smoke_results(base, done, name, claims, prefix=None):
    """What every notebook leaves behind, its number of claims among it, their ids below `prefix` (default.

    The notebook's name); the claims themselves.
    """
    assert done[name].returncode == 0, done[name].stderr[-2000:]
    assert {p.name for p in (base / name).iterdir()} == RESULT_FILES
    found = json.loads((base / name / "claims.json").read_text())
    assert len(found) == claims == len({c["id"] for c in found}) and {c["id"].split(".")[0] for c in found} == {
        prefix or name
    }
    assert {c["verdict"] for c in found} <= {"holds", "fails", "inconclusive"}
    assert json.loads((base / name / "results.json").read_text())["provenance"]["versions"]["torch"]
    return found


def parameters(words):
    "What papermill makes of the words of its command line."
    given, words = {}, [str(w) for w in words]
    while words:
        option = words.pop(0)
        if option == "-p":
            given |= {words.pop(0): _resolve_type(words.pop(0))}
        else:
            given |= yaml.safe_load(Path(words.pop(0)).read_text() if option == "-f" else words.pop(0))
    return given


def check_refused(repo, tmp_path, name, args, words, folder=None):
    """A notebook with wrong parameters says `words` in one sentence, and writes nothing.

    papermill's words and its injected cell, but the cells run here: a kernel for each would take seconds.
    """
    notebook = parameterize_notebook(load_notebook_node(str(notebook_path(name, repo))), parameters(args))
    with pytest.MonkeyPatch.context() as m, pytest.raises((ValueError, OSError)) as said:
        m.setenv("NSKD_OUTPUTS", str(tmp_path / "results"))
        m.delenv("IN_TEST", raising=False)
        m.chdir(folder or tmp_path)
        namespace = {"__name__": "__main__"}
        for cell in (c.source for c in notebook.cells if c.cell_type == "code"):
            assert "write_results(" not in cell and "= distil(" not in cell, "nothing was refused"
            exec(compile(cell, name, "exec"), namespace)
    assert words in str(said.value) and "\n" not in str(said.value)
    assert not (tmp_path / "results").exists()


def numbers(folder, name):
    frame = pd.read_csv(folder / name / "records.csv")
    return frame.drop(columns=["seconds", "directory", "cached"])


@pytest.fixture(scope="module")
def runs(repo, tmp_path_factory):
    "Both tables at the smoke tier; Table 2 twice from nothing, by papermill and here."
    base, done = tmp_path_factory.mktemp("tables"), {}
    for folder, notebook, run in (("a", "table2", papermill), ("b", "table2", run_here), ("four", "table4", run_here)):
        (base / folder).mkdir()
        done[folder] = run(repo, notebook, base / folder / "out.ipynb", "-f", repo / f"params/smoke/{notebook}.yaml")
    return base, done


def test_smoke_runs_succeed_and_leave_their_results(runs):
    base, done = runs
    for folder, name in (("a", "table2-wrn28"), ("four", "table4-wrn28")):
        assert done[folder].returncode == 0, done[folder].stderr[-2000:]
        found = {p.name for p in (base / folder / name).iterdir()}
        assert found == {"records.csv", "table.csv", "claims.json", "summary.md", "results.json", "figure.png"}
        claims = json.loads((base / folder / name / "claims.json").read_text())
        assert len(claims) == 11 and {c["verdict"] for c in claims} <= {"holds", "fails", "inconclusive"}
        results = json.loads((base / folder / name / "results.json").read_text())
        assert results["parameters"]["steps"] == 4 and results["provenance"]["versions"]["torch"]
        notebook = json.loads((base / folder / "out.ipynb").read_text())
        assert any("injected-parameters" in c["metadata"].get("tags", []) for c in notebook["cells"])


def test_the_same_run_twice_gives_identical_metrics(runs):
    base, done = runs
    assert done["b"].returncode == 0, done["b"].stderr[-2000:]
    pd.testing.assert_frame_equal(
        numbers(base / "a", "table2-wrn28"), numbers(base / "b", "table2-wrn28"), check_exact=True
    )


def test_records_say_what_a_reader_needs(runs):
    records = pd.read_csv(runs[0] / "a/table2-wrn28/records.csv")
    assert set(records.method) == {"gaussian_rs", "ddg", "gaussian_cs", "normshift"} and set(records.norm) == {
        "bn",
        "ln",
    }
    assert {"cs", "rs", "recal", "best_cs", "best_rs", "best_recal", "best_step", "data_free", "steps", "seed"} <= set(
        records
    )
    assert records.data_free.tolist() == (records.method != "ddg").tolist()
    assert records[["cs", "rs", "recal"]].notna().all(axis=None) and records.cs.between(0, 100).all()


def test_a_warm_run_trains_nothing(repo, runs):
    base, _ = runs
    done = run_here(repo, "table2", base / "a/again.ipynb", "-f", repo / "params/smoke/table2.yaml")
    assert done.returncode == 0, done.stderr[-2000:]
    assert pd.read_csv(base / "a/table2-wrn28/records.csv").cached.all()


def test_a_table_out_of_time_shows_the_cells_it_has_and_names_the_others(repo, runs, tmp_path):
    outputs = shutil.copytree(runs[0] / "a", tmp_path / "a")
    done = run_here(
        repo,
        "table2",
        outputs / "late.ipynb",
        "-f",
        repo / "params/smoke/table2.yaml",
        "-p",
        "seeds",
        "3",
        "-p",
        "budget_seconds",
        "1e-9",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    records = numbers(outputs, "table2-wrn28")
    pd.testing.assert_frame_equal(records, numbers(runs[0] / "b", "table2-wrn28"), check_exact=True)
    lacks = json.loads((outputs / "table2-wrn28/results.json").read_text())["unfinished"]
    assert len(lacks) == 8 and all("seed 2 (the teacher is not trained)" in cell for cell in lacks)
    assert "**unfinished**" in (outputs / "table2-wrn28/summary.md").read_text()
    said = [
        o["text"]
        for c in json.loads((outputs / "late.ipynb").read_text())["cells"]
        for o in c.get("outputs", [])
        if o.get("name") == "stdout"
    ]
    assert any("unfinished: 8 of 24, which" in "".join(text) for text in said)


def test_a_table_without_time_is_empty_and_no_error(repo, tmp_path):
    done = run_here(
        repo, "table2", tmp_path / "out.ipynb", "-f", repo / "params/smoke/table2.yaml", "-p", "budget_seconds", "1e-9"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        numbers(tmp_path, "table2-wrn28").empty
        and json.loads((tmp_path / "table2-wrn28/claims.json").read_text()) == []
    )


@pytest.mark.parametrize(
    "args, words",
    [
        (["-p", "teachr", "wrn28"], "did you mean 'teacher'?"),
        (["-p", "teacher", "wrn82"], "did you mean 'wrn28'?"),
        (["-p", "seeds", "0"], "seeds must be a number of seeds from 1 up"),
        (["-p", "dataset", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_bad_parameters_fail_at_once_in_one_sentence(repo, tmp_path, args, words):
    check_refused(repo, tmp_path, "table2", args, words)


def test_papermill_ends_with_that_sentence(repo, tmp_path):
    words = "there is no parameter 'zz'"
    done = papermill(repo, "table2", tmp_path / "out.ipynb", "-p", "zz", "7", outputs=tmp_path / "results")
    assert done.returncode != 0
    assert words in done.stderr, done.stderr[-1500:]
    error = next(line for line in done.stderr.splitlines() if words in line)
    assert "Error: " in error  # a sentence, not a traceback's fragment
    assert not any((tmp_path / "results").rglob("*")) if (tmp_path / "results").exists() else True
