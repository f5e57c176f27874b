"""What installs, exports, cleans and documents the library: the parts that no notebook can check about itself."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib  # Python 3.10; pytest brings it there

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted((ROOT / "nskd").rglob("*.py"))
RUNS = {
    p.stem for p in NOTEBOOKS if re.fullmatch("(table|figure)[0-9]+|protocol|theory|claims", p.stem)
}  # by `make tables`
# By name only: the companions' and ours.
STUDIES = {p.stem for p in NOTEBOOKS if re.fullmatch("(functional|luminet|singer)_.*", p.stem)} | {
    "track_record",
    "deployment",
    "benchmark",
    "precision",
    "recipe",
}
# These are run by papermill, so each must have a cell of parameters.
PARAMETERISED = RUNS | STUDIES | {"distill"}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def parameter_cells(notebook):
    return [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]


def nbdev(command, folder):
    "Run an nbdev command in `folder`. Under IN_TEST, which nbdev_test sets, nbdev_export does nothing."
    module = {"nbdev_export": "doclinks", "nbdev_clean": "clean"}[command]
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    done = subprocess.run(
        [sys.executable, "-c", f"from nbdev.{module} import {command}; {command}()"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins():
    "requirements.txt's lines, without comments."
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return [line for line in lines if line]


# ---- requirements


def test_pins_are_exact_and_fit_the_ranges(pins, pyproject):
    assert pins[-1] == "-e .[dev]"
    ranges = {r.name: r.specifier for r in map(Requirement, pyproject["project"]["dependencies"])}
    exact = {r.name: r.specifier for r in map(Requirement, pins[:-1])}
    assert {"torch", "torchvision"} <= set(exact)  # torch without a pin brings several GB of CUDA packages
    for name, specifier in exact.items():
        (pin,) = specifier
        assert pin.operator == "=="
        assert ranges[name].contains(pin.version), f"{name} {pin.version} is outside pyproject.toml's {ranges[name]}"


def test_environment_holds_python_pip_and_the_requirements(pyproject):
    python, pip, extra = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert pip == "pip" and extra == {"pip": ["-r requirements.txt"]}
    assert Requirement(f"python{pyproject['project']['requires-python']}").specifier.contains(
        python.removeprefix("python=")
    )


def test_nbdev_is_held_below_three(pyproject):
    dev = {r.name: r.specifier for r in map(Requirement, pyproject["project"]["optional-dependencies"]["dev"])}
    for name, works, breaks in [
        ("nbdev", "2.4.14", "3.0.0"),
        ("fastcore", "1.12.3", "2.0.0"),
        ("execnb", "0.1.12", "0.2.0"),
        ("ghapi", "1.0.3", "2.0.0"),
    ]:
        assert dev[name].contains(works) and not dev[name].contains(breaks), name


def test_dev_takes_in_the_other_extras(pyproject):
    extras = pyproject["project"]["optional-dependencies"]
    (own,) = (r for r in map(Requirement, extras["dev"]) if r.name == "nskd")
    assert own.extras == set(extras) - {"dev"}


# ---- notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_what_papermill_needs(path):
    notebook = read(path)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    tagged = parameter_cells(notebook)
    if path.stem in PARAMETERISED:
        assert len(tagged) == 1, "a notebook with parameters needs exactly one tagged cell"
    assert len(tagged) <= 1 and all(c["cell_type"] == "code" for c in tagged)
    assert not any(o["output_type"] == "error" for c in notebook["cells"] for o in c.get("outputs", []))


# grids and a profile for a cluster have checks of their own
TIERS = sorted(p for p in (ROOT / "params").rglob("*.yaml") if p.parent.name not in ("grid", "slurm"))


@pytest.mark.parametrize("path", TIERS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_parameter_file_names_only_what_its_notebook_has(path):
    # papermill passes over an unknown name with a line in its log.
    (cell,) = parameter_cells(read(next(p for p in NOTEBOOKS if p.stem == path.stem)))
    names = {
        t.id
        for node in ast.parse(source(cell)).body
        for t in (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
    }
    assert set(yaml.safe_load(path.read_text()) or {}) <= names


def test_nbdev_clean_keeps_the_parameters_tag(tmp_path):
    # Without the setting that keeps it, papermill injects above the defaults and the run silently uses the defaults.
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()
    cell = {
        "cell_type": "code",
        "id": "a",
        "execution_count": 3,
        "outputs": [],
        "source": ["teacher = 'wrn28'"],
        "metadata": {"tags": ["parameters"], "scrolled": True},
    }
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    small = tmp_path / "nbs" / "small.ipynb"
    small.write_text(json.dumps({"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    nbdev("nbdev_clean", tmp_path)
    cleaned = read(small)["cells"][0]
    assert cleaned["execution_count"] is None  # it did clean
    assert cleaned["metadata"] == {"tags": ["parameters"]}


# ---- modules


def test_nbdev_export_reproduces_the_modules(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "nskd").mkdir()
    shutil.copy(ROOT / "nskd" / "__init__.py", tmp_path / "nskd")
    nbdev("nbdev_export", tmp_path)
    made = {p.relative_to(tmp_path / "nskd").as_posix(): p.read_text() for p in (tmp_path / "nskd").rglob("*.py")}
    differing = sorted(
        n
        for n in made.keys() | {p.relative_to(ROOT / "nskd").as_posix() for p in MODULES}
        if made.get(n) != ((ROOT / "nskd" / n).read_text() if (ROOT / "nskd" / n).exists() else None)
    )
    assert not differing, "run nbdev_export, or remove modules that no notebook makes"


def imports(path):
    "Each module that a file imports: (line, name)."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "vision.py"], ids=lambda p: p.stem)
def test_torchvision_is_imported_in_one_place(path):
    found = sorted(imports(path))
    assert not [f"line {line}" for line, name in found if name.split(".")[0] == "torchvision"], (
        "take it from nskd.vision"
    )
    timm = [line for line, name in found if name.split(".")[0] == "timm"]
    vision = [line for line, name in found if name.endswith("vision")]
    assert not timm or vision and vision[0] < timm[0], "timm imports torchvision: import nskd.engine.vision before it"


def test_versions_agree():
    import configparser

    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    init = ast.literal_eval(re.search(r"__version__ = (.*)", (ROOT / "nskd" / "__init__.py").read_text())[1])
    assert settings["DEFAULT"]["version"] == init


# ---- repository


def test_the_repository_is_small():
    listed = (
        subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
        if shutil.which("git")
        else None
    )
    if listed is None or listed.returncode:
        pytest.skip("this is no git checkout")
    sizes = {f: (ROOT / f).stat().st_size for f in listed.stdout.split("\0") if f and (ROOT / f).is_file()}
    assert sum(sizes.values()) < 40e6, sorted(sizes.items(), key=lambda s: -s[1])[:5]


def test_readme_links_lead_somewhere():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not made yet")
    text = re.sub(r"```.*?```|`[^`\n]*`", "", readme.read_text(), flags=re.S)
    targets = re.findall(r"\]\(<?([^)\s>]+)|(?:src|href)=[\"']([^\"']+)|^ {0,3}\[[^\]\n]+\]:\s*<?([^\s>]+)", text, re.M)
    paths = [t.partition("#")[0] for t in map("".join, targets) if not re.match(r"[a-z][a-z0-9+.-]*:|[/#]", t, re.I)]
    assert [p for p in paths if not (ROOT / p).exists()] == []


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
class TestMake:
    def make(self, *words, folder=ROOT):
        # `make test` hands its own variables and settings down, which are not what is tested here.
        env = {
            k: v
            for k, v in os.environ.items()
            if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "PYTHON", "ARGS")
        }
        return subprocess.run(["make", *words], cwd=folder, env=env, capture_output=True, text=True)

    def test_help_is_the_default_and_lists_every_target(self):
        phony = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
        help_ = self.make()
        assert help_.returncode == 0
        *targets, notebooks = help_.stdout.splitlines()[1:]
        assert phony == [line.split()[0] for line in targets]
        assert (
            notebooks.split()[0] == "NAME"
            and set(notebooks.split()[-len(RUNS) :]) == RUNS
            and notebooks.endswith(" claims")
        )
        assert {"help", "table2", "tables", "test", "lab", "export", "readme", "clean", "distclean"} <= set(phony)

    def test_table2_is_one_papermill_command(self):
        plan = self.make("-n", "-o", ".venv/.ok", "table2", "TEACHER=r34", "ARGS=-p seeds 2").stdout
        assert ".venv/bin/papermill nbs/table2.ipynb 'outputs/table2-r34.ipynb' -p teacher 'r34' -p seeds 2" in plan

    def test_every_notebook_has_a_target(self):
        def plan(*words):
            return self.make("-n", "-o", ".venv/.ok", *words).stdout

        for name in RUNS - {"table2", "table4", "claims"} | STUDIES:
            there = next(p for p in NOTEBOOKS if p.stem == name).relative_to(ROOT)
            assert f".venv/bin/papermill {there} 'outputs/{name}.ipynb'  -p seeds 2\n" in plan(
                name, "ARGS=-p seeds 2"
            ), name
        assert ".venv/bin/papermill nbs/claims.ipynb 'outputs/claims.ipynb' -p source fresh -p absent all" in plan(
            "claims"
        )
        assert "'elsewhere/t.ipynb'" in plan("table7", "OUT=elsewhere/t.ipynb") and "mkdir" in plan("tables")

    def test_what_nbdev_test_leaves_out_is_run_by_pytest(self):
        plan = self.make("-n", "-o", ".venv/.ok", "test").stdout
        skipped = {p.stem for p in NOTEBOOKS if re.search(re.search(r"--skip_file_re '(.*?)'", plan)[1], p.name)}
        text = {p.name: p.read_text() for p in (ROOT / "tests").glob("test_*.py")}
        run = {
            n
            for t in text.values()
            for n in re.findall(
                r'\b(?:papermill|run_here|run)\(\s*repo,\s*"(\w+)"|\("\w+", "(\w+)", (?:papermill|run_here)\)', t
            )
            for n in n
            if n
        }
        for t in text.values():
            run |= {n for d in re.findall(r"^(?:CLAIMS|NOTEBOOKS) = (\{.*?\})", t, re.M) for n in ast.literal_eval(d)}
        assert skipped and skipped == {p.stem for p in NOTEBOOKS if parameter_cells(read(p))} and skipped <= run

    def test_tables_runs_all_goes_on_after_a_failure_and_names_it(self, tmp_path):
        shutil.copy(ROOT / "Makefile", tmp_path)
        for name in (
            "requirements.txt",
            "pyproject.toml",
            ".venv/bin/x",
            "nbs/table2.ipynb",
            "nbs/figure1.ipynb",
            "nbs/theory.ipynb",
            "nbs/claims.ipynb",
            "nbs/method/09_data.ipynb",
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        for name, script in (("papermill", 'echo "$1" >> ran; test "$1" != nbs/table2.ipynb'), ("python", "true")):
            (tmp_path / ".venv/bin" / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / ".venv/bin" / name).chmod(0o755)
        (tmp_path / ".venv/.ok").touch()
        plan = self.make("-n", "tables", folder=tmp_path)
        assert plan.returncode == 0 and not (tmp_path / "outputs").exists()  # a plan runs nothing
        done = self.make("tables", "OUT=ignored.ipynb", folder=tmp_path)
        assert (tmp_path / "ran").read_text().split() == [
            f"nbs/{n}.ipynb" for n in ("figure1", "table2", "theory", "claims")
        ]
        assert [re.sub(r"\d+ s", "0 s", line) for line in done.stdout.splitlines()] == [
            "figure1: 0 s",
            "table2: 0 s, failed: see outputs/table2.log",
            "theory: 0 s",
            "claims: 0 s",
            "all: 0 s",
        ]
        assert (
            done.returncode != 0
            and "error: failed: table2\n" in done.stderr
            and "papermill nbs/table2.ipynb" in (tmp_path / "outputs/table2.log").read_text()
        )
        (tmp_path / ".venv/bin/papermill").write_text("#!/bin/sh\n")
        assert self.make("tables", folder=tmp_path).returncode == 0

    @pytest.mark.parametrize(
        "python, says",
        [
            ("no-such-python", "error: no-such-python does not run"),
            ("./old", "error: Python 3.10 or newer is needed, ./old is Python 3.9.2"),
            ("./bare", "error: ./bare has no venv module"),
        ],
    )
    def test_a_python_that_cannot_do_it_is_named(self, tmp_path, python, says):
        for name in ("Makefile", "requirements.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        for name, word in (("old", "version_info"), ("bare", "ensurepip")):  # each fails at the check it is named for
            (tmp_path / name).write_text(f'#!/bin/sh\ncase "$*" in *{word}*) exit 1;; -V) echo Python 3.9.2;; esac\n')
            (tmp_path / name).chmod(0o755)
        done = self.make("--no-print-directory", ".venv/.ok", f"PYTHON={python}", folder=tmp_path)
        assert done.returncode != 0 and not (tmp_path / ".venv").exists()
        assert says in done.stderr and done.stderr.count("error:") == 1

    def test_clean_keeps_published_results_and_the_environment(self, tmp_path):
        shutil.copy(ROOT / "Makefile", tmp_path)
        kept = ["outputs/published/t.csv", ".venv/lib/__pycache__/a.pyc", "nskd/a.py", "data/d.bin"]
        gone = [
            "outputs/run/h.csv",
            "outputs/t.ipynb",
            "nskd/__pycache__/a.pyc",
            "nbs/.ipynb_checkpoints/a.ipynb",
            ".pytest_cache/x",
            "nskd.egg-info/x",
        ]
        for name in kept + gone:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        assert self.make("clean", folder=tmp_path).returncode == 0
        assert [n for n in kept if not (tmp_path / n).exists()] == [] == [n for n in gone if (tmp_path / n).exists()]
        assert self.make("distclean", folder=tmp_path).returncode == 0 and not (tmp_path / ".venv").exists()


def test_wheel_holds_the_modules_and_the_licence(tmp_path):
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if not (ROOT / name).exists():
            pytest.skip(f"{name} is not made yet")
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nskd", tmp_path / "nskd", ignore=shutil.ignore_patterns("__pycache__"))
    # Without isolation nothing is fetched: torch itself requires a setuptools that is new enough.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "-w",
            "dist",
            ".",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("nskd-*-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {p.relative_to(ROOT).as_posix() for p in MODULES} == {n for n in names if n.startswith("nskd/")}
    assert any(n.endswith("licenses/LICENSE") for n in names)
    entry = next(n for n in names if n.endswith("entry_points.txt"))
    assert "nskd = nskd._modidx:d" in zipfile.ZipFile(wheel).read(entry).decode()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_no_syntax_newer_than_the_oldest_python(path):
    "Python 3.10 knows no star in a subscript; what else is newer, its own parser's feature_version rejects."
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    starred = [
        n.lineno
        for n in ast.walk(tree)
        if isinstance(n, ast.Subscript)
        and isinstance(n.slice, ast.Tuple)
        and any(isinstance(e, ast.Starred) for e in n.slice.elts)
    ]
    assert not starred, f"a[*b] in lines {starred}"
