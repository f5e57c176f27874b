"""A cached result is never served after its code has changed, and that code is found by the library."""

import ast
import os
import shutil
import subprocess
import sys
from importlib.util import resolve_name

import pytest

from nskd.engine.keys import code_key, import_closure

CHANGES = {
    "norms": {"teachers", "distillation"},
    "losses": {"distillation"},
    "samplers": {"distillation"},
    "engine/config": {"teachers", "distillation"},
    "practice/deploy": set(),
}


def keys(package):
    "The keys of some results in a copy of the library."
    code = """
        from nskd.distillation import distill
        from nskd.engine.keys import code_key
        from nskd.teachers import train_teacher
        print(code_key(train_teacher), code_key(distill))"""
    code = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=package.parent,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(("teachers", "distillation"), done.stdout.split()))


@pytest.fixture(scope="module")
def package(repo, tmp_path_factory):
    return shutil.copytree(
        repo / "nskd", tmp_path_factory.mktemp("copy") / "nskd", ignore=shutil.ignore_patterns("__pycache__")
    )


@pytest.mark.parametrize("module", CHANGES)
def test_a_key_follows_every_module_that_its_code_imports(package, module):
    before, file = keys(package), package / f"{module}.py"
    source = file.read_text(encoding="utf-8")
    try:
        file.write_text(source + "\n# a comment\n", encoding="utf-8")
        assert keys(package) == before
        file.write_text(source + "\nchanged = 1\n", encoding="utf-8")
        assert {name for name, key in keys(package).items() if key != before[name]} == CHANGES[module]
    finally:
        file.write_text(source, encoding="utf-8")


def test_imports_inside_functions_count(repo):
    "Every import statement of a module is followed, wherever it stands."
    for name in import_closure("nskd.teachers", "nskd.distillation"):
        tree = ast.parse((repo / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level and node.module:
                imported = resolve_name("." * node.level + node.module, name.rpartition(".")[0])
                assert imported in import_closure(name)


def test_a_notebooks_own_function_counts_with_its_code():
    def one():
        return 1

    def two():
        return 2

    one.__module__ = two.__module__ = "__main__"
    assert code_key(one) == code_key(one) != code_key(two)
