"""A cached result is never served after a change of what it depends on: the code that its key covers, against what that code imports."""
import ast, importlib

import pytest

from nskd import attention_runs, distillation, experiments, runs, teachers, theory_runs
from nskd.experiments import distil_cell
from nskd.parameters import Cell
from nskd.runs import code_key

# of these no code has a part in numbers (`parameters` is resolved into what a key holds; `vision` loads torchvision, whose version a key holds)
NO_PART = {"runs", "vision", "plots", "parameters", "reporting", "preflight"}
# besides, with the reason
ELSEWHERE = {teachers: {},
             experiments: {"experiments": "the definitions that count are named", "teachers": "a teacher's key is that of its weights; `augment` is added for real images",
                           "variants": "added for variants", "diagnostics": "added for alpha='auto'"},
             distillation: {"diagnostics": "alpha is in the key as the number that was found", "teachers": "the teacher's weights are in the key", "models": "so are the student's",
                            "data": "and the test images", "image_files": "as above", "experiments": "not imported"},
             attention_runs: {"experiments": "runs jobs", "teachers": "the network's weights are in the key", "checkpoints": "of its training", "evaluation": "of its training"},
             theory_runs: {"experiments": "runs jobs", "teachers": "both networks' weights are in the key", "checkpoints": "of their training", "evaluation": "of their training", "data": "shapes only",
                           "image_files": "shapes only", "attention_runs": "parameters only"}}


def imported(module):
    "Modules of nskd that a module of nskd imports, anywhere in it."
    tree = ast.parse(open(importlib.import_module(f"nskd.{module}").__file__).read())
    relative = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module}
    return relative | {a.name.split(".")[1] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names if a.name.startswith("nskd.")}


@pytest.mark.parametrize("module", ELSEWHERE, ids=lambda m: m.__name__)
def test_a_key_covers_all_code_that_its_code_imports(module):
    covered, seen = {part for part in module._CODE if "." not in part}, set()
    start = covered | {module.__name__.removeprefix("nskd.")}
    while start - seen:
        m = (start - seen).pop()
        seen.add(m)
        start |= {i for i in imported(m) if i in covered}
    uncovered = {i for m in seen for i in imported(m)} - covered - NO_PART - set(ELSEWHERE[module])
    assert not uncovered


def keys(monkeypatch, tmp_path, cell, changed=None):
    "The key under which `cell` would be cached, with one definition or module changed."
    def code(*parts): return runs.content_key([(p, p == changed) for p in parts])
    class Found(Exception): pass
    def cached(kind, config, make, **kw): raise Found(runs.content_key(config))
    with monkeypatch.context() as m:
        m.setenv("NSKD_OUTPUTS", str(tmp_path))
        m.setattr(experiments, "code_key", code); m.setattr(experiments, "cached", cached)
        with pytest.raises(Found) as found: distil_cell(cell)
    return str(found.value)


def test_real_images_depend_on_augmentation_and_noise_does_not(monkeypatch, tmp_path):
    small = dict(teacher="wrn16", norm="bn", student="wrn16", seed=0, teacher_width=1, student_width=1, teacher_epochs=1, options=dict(steps=2, batch_size=16, eval_every=2))
    real, noise = Cell(method="real", real_images=20, **small), Cell(method="gaussian_cs", **small)
    same = {c.method: keys(monkeypatch, tmp_path, c) for c in (real, noise)}
    for changed, which in (("teachers.augment", {"real"}), ("teachers.teacher_recipe", {"real"}), ("image_files", {"real", "gaussian_cs"}), ("experiments.cell_sampler", {"real", "gaussian_cs"})):
        assert {c.method for c in (real, noise) if keys(monkeypatch, tmp_path, c, changed) != same[c.method]} == which


def test_a_key_follows_the_code_of_one_definition(tmp_path, monkeypatch):
    source = open(teachers.__file__).read()
    changed = tmp_path/"teachers.py"
    changed.write_text(source.replace("padded = F.pad(images, (shift,) * 4)", "padded = F.pad(images, (shift,) * 4, value=1.0)"))
    before = [code_key("teachers.augment"), code_key("teachers.teacher_recipe"), code_key("teachers")]
    code_key.cache_clear()
    monkeypatch.setattr(teachers, "__file__", str(changed))
    after = [code_key("teachers.augment"), code_key("teachers.teacher_recipe"), code_key("teachers")]
    code_key.cache_clear()
    assert [a == b for a, b in zip(before, after)] == [False, True, False]
