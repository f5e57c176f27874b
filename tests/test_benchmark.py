"""The notebooks on speed and precision, and the benchmark's command, as a user runs them. What they measure is not
judged here: a test's machine is busy.
"""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch

from nskd.benchmark import CASES, Case, Ours, Plain, plain_select
from nskd.benchmark.room import BenchmarkParameters
from nskd.experiments.parameters import check_parameters
from nskd.samplers import rejection_sample
from test_tables import check_smoke_results

CLAIMS = {"benchmark": 7, "precision": 2, "recipe": 8}


def test_smoke_run_leaves_its_results(smoke):
    base, done = smoke
    check_smoke_results(base, done, "benchmark", 7)
    check_smoke_results(base, done, "precision", 2)
    check_smoke_results(base, done, "recipe", 8)
    records = pd.read_csv(base / "benchmark/records.csv")
    assert (records.ratio > 0).all() and (records.roofline_fraction > 0).all() and (records.peak_mb_ours > 50).all()


def test_the_command_prints_json_and_nothing_else(repo):
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "nskd.benchmark",
            "--case",
            "digits",
            "--json",
            "--turns",
            "1",
            "--batch-size",
            "16",
            "--k",
            "2",
            "--threads",
            "1",
            "--device",
            "cpu",
        ],
        cwd=repo,
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = json.loads(run.stdout)
    assert run.returncode == 0 and {"ratio", "ratio_low", "ratio_high", "images_per_s", "roofline_fraction"} <= set(
        found
    ), run.stderr[-1000:]


@pytest.mark.parametrize("norm", ["bn", "ln", "gn"])
def test_both_loops_ask_the_same_question(norm):
    "Same networks and inputs: the two teachers' answers agree, so that only speed is compared."
    x = torch.randn(24, 1, 8, 8)
    plain, ours = Plain(Case("digits", "cpu", norm, "fp32", 2, 24)), Ours(Case("digits", "cpu", norm, "fp32", 2, 24))
    with torch.no_grad():
        torch.testing.assert_close(plain.teacher(x), ours.job.batches.query(x), rtol=1e-3, atol=1e-3)
    assert plain.step() > 0
    ours.step()
    ours.close()
    assert ours.job.step == 1


def test_the_plain_choice_is_as_fair_as_ours():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        labels = torch.multinomial(torch.rand(10, generator=g) ** 3 + 1e-3, 400, replacement=True, generator=g)
        counts = [
            labels[pick].bincount(minlength=10).sort().values.tolist()
            for pick in (plain_select(labels, 100, 10), rejection_sample(labels, 100, 10, g))
        ]
        assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(cases="digit"), "did you mean 'digits'?"),
        (dict(norms="in"), "norm"),
        (dict(turns=0), "greater than or equal to 1"),
        (dict(k=1), "greater than or equal to 2"),
        (dict(turn=3), "did you mean 'turns'?"),
        (dict(precision="fp16"), "precision"),
        (dict(machine="a/b"), "machine"),
    ],
)
def test_bad_parameters_are_one_sentence(bad, words):
    with pytest.raises(ValueError) as e:
        check_parameters(dict(bad), BenchmarkParameters)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_every_case_can_be_built():
    for name, spec in CASES.items():
        case = Case(name, "cpu")
        assert case.cfg.batch_size == spec["batch_size"]["cpu"] and case.teacher.input_shape == spec["shape"]


def test_both_loops_wait_as_pytorch_comes(monkeypatch):
    "A policy of this process's own would slow the plain loop's threads."
    from nskd.benchmark import _as_pytorch_waits

    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with _as_pytorch_waits():
        assert "OMP_WAIT_POLICY" not in os.environ
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_ways_of_the_precision_study_are_compared_to_float32():
    from nskd.tables.precision import PrecisionSweep

    with pytest.raises(ValueError, match="ways must hold fp32"):
        PrecisionSweep(ways="teacher,bf16")
    with pytest.raises(ValueError, match="bf61"):
        PrecisionSweep(ways="fp32,bf61")
    p = PrecisionSweep(ways="fp32,bf16")
    assert (p.run_name(), PrecisionSweep().run_name()) == ("precision-bf16", "precision")
    assert p.arithmetic("bf16") == {"precision": "bf16"} and p.arithmetic("teacher") == {"precision": "auto"}
