"""The functional study's notebooks at the smoke tier, the ways to get a parameter wrong, and its metrics by
property.
"""

import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nskd.functional.metrics import METRICS, MORE_METRICS, functional_metrics, transfer_test
from nskd.functional.text import load_text
from test_tables import check_refused, check_smoke_results

CLAIMS = {"functional_table3": 11, "functional_table14": 8, "functional_gradient": 11, "functional_noise": 11}


@pytest.mark.parametrize("name", CLAIMS)
def test_smoke_runs_succeed_and_leave_their_results(smoke, name):
    base, done = smoke
    claims = check_smoke_results(base, done, name, CLAIMS[name], prefix="functional")
    assert all(c["id"].startswith(f"functional.{name.removeprefix('functional_')}-") for c in claims)


def test_every_condition_has_every_seed(smoke):
    records = pd.read_csv(smoke[0] / "functional_table3/records.csv")
    assert (
        len(records) == 7 * 5
        and set(records.seed) == set(range(10, 15))
        and set(records.kind) == {"siddo", "kd", "rcd", "ls"}
    )
    assert records[[*METRICS, *MORE_METRICS, "agreement_correct", "agreement_incorrect", "loss"]].notna().all(axis=None)
    assert records.groupby("alpha").kind.unique().map(set).tolist() == [
        {"siddo"},
        {"kd", "rcd", "ls"},
        {"kd", "rcd", "ls"},
    ]


def test_algebra_holds_exactly_at_every_tier(smoke):
    claims = {
        c["id"]: c["verdict"]
        for c in check_smoke_results(*smoke, "functional_gradient", CLAIMS["functional_gradient"], prefix="functional")
    }
    for id in ("formula", "wrong-class", "teacher-part", "negated", "uniform", "smoothing"):
        assert claims[f"functional.gradient-{id}"] == "holds", id


def test_controls_stand_beside_every_noise_student(smoke):
    records = pd.read_csv(smoke[0] / "functional_noise/records.csv")
    assert (
        len(records) == 2 * 5 * 3
        and records.groupby(["setting", "seed"]).model.unique().map(set).eq({"noise", "real", "other"}).all()
    )


@pytest.mark.parametrize(
    "name, args, words",
    [
        ("functional_table3", ["-p", "seeds", "4"], "4 student seeds are too few for a Wilcoxon test"),
        (
            "functional_table3",
            ["-y", "seeds: [2, 10, 11, 12, 13]"],
            "student seeds must differ from teacher seeds, and 2 is in both",
        ),
        ("functional_table3", ["-p", "teacher_epochs", "3"], "a teacher is trained as its students are"),
        ("functional_table14", ["-p", "dropout", "0.2"], "can't be stacked"),
        ("functional_noise", ["-p", "ks", "4,8"], "ks must hold 1"),
        ("functional_gradient", ["-p", "alpha", "0.5"], "did you mean 'alphas'?"),
    ],
)
def test_bad_parameters_fail_at_once_in_one_sentence(repo, tmp_path, name, args, words):
    check_refused(repo, tmp_path, name, args, words)


logits = st.integers(0, 2**31).flatmap(
    lambda seed: st.tuples(st.integers(1, 40), st.integers(2, 9), st.floats(0.1, 50)).map(
        lambda n: tuple(
            n[2] * torch.randn(n[0] + 1, n[1], generator=torch.Generator().manual_seed(seed + i), dtype=torch.double)
            for i in (0, 1)
        )
    )
)


@settings(max_examples=40, deadline=None)
@given(logits)
def test_distances_are_symmetric_bounded_and_zero_for_a_copy(pair):
    a, b = pair
    there, back, none = functional_metrics(a, b), functional_metrics(b, a), functional_metrics(a, a)
    most = {
        "activation_distance": 2**0.5,
        "rank_disagreement": 1,
        "prediction_disagreement": 1,
        "js_divergence": math.log(2),
        "variation_of_information": 2 * math.log(a.shape[1]),
        "procrustes_distance": 2,
    }
    for m, top in most.items():
        assert (
            math.isclose(there[m], back[m], abs_tol=1e-9) and -1e-12 <= there[m] <= top + 1e-9 and abs(none[m]) < 1e-9
        ), m


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=5, max_size=12))
def test_no_transfer_without_an_improvement(values):
    students = {m: [1 + abs(v) for v in values] for m in METRICS}
    assert transfer_test(students, {"a": {m: [1.0] * len(values) for m in METRICS}}).verdict == "not supported"


def test_tinyshakespeare_is_read_and_checked(shared):
    if not (shared / "data/tinyshakespeare/input.txt").exists():
        pytest.skip("shared/data/tinyshakespeare/input.txt is not there")
    text = load_text("tinyshakespeare", root=shared / "data", download=False)
    assert len(text.tokens) == 1_115_394 and len(text.characters) == 65
