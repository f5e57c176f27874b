"""Every default path under both answers that a machine may give about bfloat16, forced: the tests' own machine has
only one.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from nskd.benchmark import Case, step_flops
from nskd.dataset import Dataset
from nskd.practice.deploy import accuracy_by_batch_size
from nskd.distillation import DistillConfig, distill
from nskd.engine.hardware import pick_student_precision, pick_teacher_precision
from nskd.models import create_model
from nskd.diagnostics.preflight import preflight
from nskd.teachers import teacher_recipe, train_teacher


@pytest.fixture(params=["0", "1"], ids=["fp32", "bf16"])
def bf16(request, monkeypatch):
    "The forced answer to whether this machine gains by bfloat16."
    from nskd.engine.hardware import bf16_is_faster

    monkeypatch.setenv("NSKD_BF16", request.param)
    bf16_is_faster.cache_clear()
    yield request.param == "1"
    bf16_is_faster.cache_clear()


def images(size, n=40):
    "A data set of two easy classes."
    g = torch.Generator().manual_seed(0)
    pixels = {s: torch.randint(256, (n, 3, size, size), generator=g, dtype=torch.uint8) for s in ("train", "test")}
    for x in pixels.values():
        x[::2] //= 3
    labels = {s: torch.arange(n) % 2 for s in pixels}
    return Dataset("easy", pixels, labels, ["dark", "bright"])


@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize("size", [8, 32])
def test_every_default_path_works(size, norm, bf16, tmp_path, monkeypatch):
    "Train, preflight, distil with more steps than any trial needs, judge: with every precision left at its default."
    monkeypatch.setenv("NSKD_OUTPUTS", str(tmp_path))
    ds = images(size)
    teacher = train_teacher(
        "wrn16", ds, norm=norm, width=1, recipe=teacher_recipe(ds).replace(epochs=1, batch_size=20), progress=False
    )
    assert preflight(teacher, ds.shape, samples=64, batch_size=32).verdict
    student = create_model("wrn16", 2, 3, size, width=1, seed=1)
    cfg = DistillConfig(k=2, batch_size=16, steps=50, eval_every=50)
    result = distill(teacher, student, cfg, tmp_path / "run", (ds.test_images, ds.test_labels), progress=False)
    assert result.state == "finished" and result.history.loss.notna().all()
    assert all(p.dtype == torch.float32 for net in (teacher, result.student) for p in net.parameters())
    assert len(accuracy_by_batch_size(result.student, ds.test_images, ds.test_labels, sizes=(1, 8))) > 1
    shape, cpu = (3, size, size), torch.device("cpu")
    assert pick_teacher_precision("auto", cpu) == ("bf16" if bf16 else "fp32")
    assert pick_student_precision("auto", cpu, shape) == ("bf16" if bf16 and size == 32 else "fp32")


@pytest.mark.parametrize("case", ["digits", "cifar"])
def test_flops_do_not_depend_on_the_precision(case, bf16):
    flops = step_flops(Case(case, "cpu", k=2, batch_size=4))
    assert flops == step_flops(Case(case, "cpu", k=2, batch_size=4, precision="fp32")) and min(flops.values()) > 0


@pytest.mark.parametrize("case", ["digits", "cifar"])
@pytest.mark.parametrize("answer", ["0", "1"])
def test_the_benchmarks_command_works(case, answer, repo):
    command = [
        sys.executable,
        "-m",
        "nskd.benchmark",
        "--case",
        case,
        "--json",
        "--turns",
        "1",
        "--batch-size",
        "4",
        "--k",
        "2",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        command, cwd=repo, env={**os.environ, "NSKD_BF16": answer}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and 0 < json.loads(done.stdout)["roofline_fraction"], done.stderr[-2000:]


def test_a_forced_answer_is_checked(monkeypatch):
    from nskd.engine.hardware import bf16_is_faster

    monkeypatch.setenv("NSKD_BF16", "yes")
    bf16_is_faster.cache_clear()
    with pytest.raises(ValueError, match="NSKD_BF16 must be one of 0, 1"):
        bf16_is_faster("cpu")
    bf16_is_faster.cache_clear()
