"""The house: floors that import downwards only, no circles, every notebook in its package's folder, lines that can be
read.
"""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT / "nskd").rglob("*.py") if p.name != "_modidx.py")
# the faces of packages, and the flat modules of the method; the benchmark is a package with a command
FOLDERS = {"": "method"}


def lint(folder):
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": "", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def exported(path):
    "The module that a notebook defines, or None."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if found := re.match(r"#\| *default_exp (\S+)", "".join(cell["source"])):
            return found[1]
    return None


def test_everything_imports_downwards_and_nothing_in_a_circle():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "module, line",
    [
        ("engine/config.py", "from nskd.norms import align_batch"),
        ("losses.py", "def f():\n    from nskd.tables.alpha import AlphaSweep"),
        ("functional/metrics.py", "from nskd.singer.adapter import gram"),
        ("engine/files.py", "from nskd.engine.runs import cached"),
    ],
)
def test_the_floors_can_fail(module, line, tmp_path):
    "An upward import, one inside a function, one between neighbours, and a circle."
    import shutil

    shutil.copytree(ROOT / "nskd", tmp_path / "nskd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "nskd" / module
    file.write_text(f"{file.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    assert lint(tmp_path).returncode != 0


def test_every_notebook_lies_in_its_packages_folder():
    wrong = {}
    for path in NOTEBOOKS:
        module = exported(path)
        if module is None:
            continue
        package, _, name = module.rpartition(".")
        wrong |= {} if path.parent.name == (package or "method") else {path.name: module}
    assert not wrong


def test_no_module_is_an_orphan():
    made = {exported(p) for p in NOTEBOOKS} - {None}
    there = {p.relative_to(ROOT / "nskd").with_suffix("").as_posix().replace("/", ".") for p in MODULES}
    empty = {m for m in there - made if not (ROOT / "nskd" / (m.replace(".", "/") + ".py")).read_text().strip()}
    assert there - made - empty - {"__init__"} == set() == made - there


def test_no_two_notebooks_have_one_name():
    assert [name for name, n in Counter(p.name for p in NOTEBOOKS).items() if n > 1] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT / "nskd").as_posix())
def test_no_private_name_is_taken_from_another_module(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("nskd"))
        for alias in node.names
    }
    assert not [name for name in names if name.startswith("_")]


def test_only_two_places_know_of_tests():
    "Where results go under test, and which parameters a notebook takes: nothing else in the library may look."
    knows = {p.relative_to(ROOT / "nskd").as_posix() for p in MODULES if "IN_TEST" in p.read_text(encoding="utf-8")}
    assert knows <= {"engine/files.py", "experiments/parameters.py"}


def test_every_file_is_opened_with_its_encoding_or_as_bytes():
    "A locale that isn't UTF-8 must not change what is read."
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            given = {k.arg for k in node.keywords}
            if name in ("read_text", "write_text") and "encoding" not in given:
                found.append(f"{path.name}:{node.lineno}")
    assert not found


@pytest.mark.parametrize("words", [["format", "--check"], ["check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(words):
    done = subprocess.run([sys.executable, "-m", "ruff", *words, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
