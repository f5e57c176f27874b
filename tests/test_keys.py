"""A cached result is never served after a change of the code that it depends on, and that code is found by the
library.
"""

import os
import shutil
import subprocess
import sys

import pytest

from nskd.engine.keys import code_key, import_closure

CHANGES = {
    "norms": {"teachers", "distillation"},
    "losses": {"distillation"},
    "samplers": {"distillation"},
    "image_files": set(),
    "practice.export": set(),
    "engine.config": {"teachers", "distillation"},
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
    before, file = keys(package), package / (module.replace(".", "/") + ".py")
    source = file.read_text(encoding="utf-8")
    try:
        file.write_text(source + "\n# a comment\n", encoding="utf-8")
        assert keys(package) == before
        file.write_text(source + "\nchanged = 1\n", encoding="utf-8")
        assert {name for name, key in keys(package).items() if key != before[name]} == CHANGES[module]
    finally:
        file.write_text(source, encoding="utf-8")


def test_imports_inside_functions_count():
    "torchvision's shim is imported inside a function, where an average of weights needs timm."
    assert "nskd.engine.vision" in import_closure("nskd.distillation")


def test_a_closure_is_closed(repo):
    for name in (found := import_closure("nskd.teachers", "nskd.distillation")):
        assert set(import_closure(name)) <= set(found)
    assert not [name for name in found if name.startswith(("nskd.tables", "nskd.practice", "nskd.experiments"))]


def test_a_notebooks_own_function_counts_with_its_code():
    def one():
        return 1

    def two():
        return 2

    one.__module__ = two.__module__ = "__main__"
    assert code_key(one) == code_key(one) != code_key(two)
