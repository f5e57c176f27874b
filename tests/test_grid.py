"""Six cells by Snakemake, one of which is made to fail: what is left, what is said, and what a second run does."""

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

pytest.importorskip("snakemake")
pytestmark = pytest.mark.filterwarnings("ignore")

# What a table notebook does, without training: it fills the cache, a seed at a time, and reads it.
PARAMETERS = "seeds = 1\nwidth = 'narrow'\nworkers = 'auto'"
WORK = """
import os
from pathlib import Path
from nskd.engine.runs import cached
from nskd.engine.files import outputs_dir
if (planted := outputs_dir()/"planted").exists() and planted.read_text() in map(str, seeds):
    raise ValueError(f"seed {planted.read_text()} has no teacher")
every = range(seeds) if isinstance(seeds, int) else seeds
found = [cached("made", {"seed": s}, lambda d: {"value": s*s}, label=str(s)) for s in every]
where = Path(os.environ["NSKD_RESULTS"])/"tiny"
where.mkdir(parents=True, exist_ok=True)
(where/"table.txt").write_text(" ".join(f"{r['value']}:{r['cached']}" for r in found))
"""
CHECK = """
def never():
    from nskd.experiments.parameters import RunParameters
    from nskd.experiments.parameters import check_parameters
    check_parameters(globals(), RunParameters)          # where `nskd.experiments.grid` finds the model
"""


@pytest.fixture(scope="module")
def base(repo, tmp_path_factory):
    "A repository with one small notebook, a grid of six cells, and the real Snakefile."
    base = tmp_path_factory.mktemp("grid")
    for folder in ("nbs", "params/grid", "outputs"):
        (base / folder).mkdir(parents=True)
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(CHECK), new_code_cell(WORK)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), base / "nbs/tiny.ipynb")
    (base / "params/Snakefile").write_text((repo / "params/Snakefile").read_text())
    (base / "params/grid/six.yaml").write_text("notebook: tiny\nseeds: 6\n")
    return base


def snakemake(repo, base, *words, grid="six"):
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {
        "NSKD_OUTPUTS": str(base / "outputs"),
        "PYTHONPATH": str(repo),
    }
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "snakemake",
            "-s",
            str(base / "params/Snakefile"),
            "--config",
            f"grid={base}/params/grid/{grid}.yaml",
            "--cores",
            "2",
            "--keep-going",
            "--rerun-incomplete",
            *words,
        ],
        cwd=base,
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def ran(done):
    return sorted(re.findall(r"wildcards: label=(\S+)", done.stdout + done.stderr))


def left(base, kind):
    return sorted(p.stem for p in (base / "outputs/grid/six" / kind).glob("*.ipynb"))


@pytest.fixture(scope="module")
def runs(repo, base):
    "A run with a planted failure, and one after it was mended, with what lay there in between."
    (base / "outputs/planted").write_text("3")
    first = snakemake(repo, base)
    between = {kind: left(base, kind) for kind in ("done", "unfinished")} | {
        "notebook": (base / "outputs/grid/six/unfinished/seeds-3.ipynb").read_text()
    }
    (base / "outputs/planted").unlink()
    return first, between, snakemake(repo, base)


def test_one_cell_fails_and_five_finish(runs):
    first, between, _ = runs
    assert first.returncode != 0
    assert between["done"] == [f"seeds-{s}" for s in (0, 1, 2, 4, 5)], first.stderr[-3000:]


def test_the_failed_cell_is_named_and_its_notebook_kept(base, runs):
    first, between, _ = runs
    assert between["unfinished"] == ["seeds-3"]
    assert (
        "failed: seeds-3: ValueError: seed 3 has no teacher\n"
        f"  its notebook: {base}/outputs/grid/six/unfinished/seeds-3.ipynb" in first.stderr
    )
    kept = json.loads(between["notebook"])
    assert any("seed 3 has no teacher" in o.get("evalue", "") for c in kept["cells"] for o in c.get("outputs", []))


def test_mended_it_runs_what_failed_and_the_table_and_nothing_else(base, runs):
    second = runs[2]
    assert second.returncode == 0, second.stderr[-3000:]
    assert ran(second) == ["seeds-3", "table-tiny"] and left(base, "unfinished") == []
    # the table's job made nothing: it read what the cells had left
    assert (base / "outputs/tiny/table.txt").read_text() == "0:True 1:True 4:True 9:True 16:True 25:True"
    assert (base / "outputs/grid/six/results/seeds-4/tiny/table.txt").read_text() == "16:False"


def test_a_third_run_does_nothing_and_a_changed_notebook_runs_again(repo, base, runs):
    (base / "nbs/tiny.ipynb").write_text(
        (notebook := (base / "nbs/tiny.ipynb").read_text())
    )  # a new time, the same content
    assert ran(snakemake(repo, base, "-n")) == []
    (base / "nbs/tiny.ipynb").write_text(notebook.replace("s*s", "s*s*s"))
    assert len(ran(snakemake(repo, base, "-n"))) == 7


def test_batches_share_the_cells_out(repo, base):
    (base / "params/grid/other.yaml").write_text("notebook: tiny\nseeds: 6\n")  # of which nothing has been run
    parts = [ran(snakemake(repo, base, "-n", "cells", "--batch", f"cells={i}/3", grid="other")) for i in (1, 2)]
    assert [len(p) for p in parts] == [2, 2] and len(set(sum(parts, []))) == 4


def test_a_wrong_grid_is_refused_in_one_sentence_before_anything_runs(repo, base):
    (base / "params/grid/wrong.yaml").write_text("notebook: tiny\nparameters: {widht: [1, 2]}\n")
    done = snakemake(repo, base, grid="wrong")
    assert (
        done.returncode != 0
        and "there is no parameter 'widht', did you mean 'width'? (tiny)" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not (base / "outputs/grid/wrong").exists()


def test_every_grid_in_the_repository_is_whole(repo):
    from nskd.experiments.grid import grid_jobs, read_grid

    found = sorted((repo / "params/grid").glob("*.yaml"))
    assert found and all(grid_jobs(read_grid(f, repo), repo)[-1]["kind"] == "table" for f in found)


def test_the_slurm_profile_is_what_snakemake_reads(repo):
    profile = yaml.safe_load((repo / "params/slurm/config.yaml").read_text())
    known = subprocess.run([sys.executable, "-m", "snakemake", "--help"], capture_output=True, text=True).stdout
    assert profile["executor"] == "slurm" and all(f"--{option}" in known for option in profile)
