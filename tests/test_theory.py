"""The checks of nskd.theory against independent references, and each of them broken by breaking what it assumes."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon
from torch import nn

from nskd.theory import laws as t
from nskd.models import create_model
from nskd.samplers import create_sampler
from nskd.tables.theory import selfless_head


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- scores


def test_score_law_is_the_sum_over_all_entries():
    w_q, w_k = t.random_head(3, 5, gen())
    a = w_q.numpy().T @ w_k.numpy()
    law = t.score_law(w_q, w_k, sigma=1.3)
    assert law.variance == pytest.approx(1.3**4 * sum(v * v for v in a.ravel()) / 3)
    assert law.self_mean == pytest.approx(1.3**2 * sum(a[i, i] for i in range(5)) / math.sqrt(3))
    # Isserlis: E[(x'Ax)²] − E[x'Ax]² = Σ a_ij (a_ij + a_ji)
    assert law.self_variance == pytest.approx(
        1.3**4 * sum(a[i, j] * (a[i, j] + a[j, i]) for i in range(5) for j in range(5)) / 3
    )
    assert law.sym_operator == pytest.approx(np.linalg.norm((a + a.T) / 2, 2))


def test_simulated_rows_are_attention_scores(monkeypatch):
    w_q, w_k = t.random_head(3, 5, gen())
    x = torch.randn(7, 4, 5, dtype=torch.float64, generator=gen(1))
    rows = t.simulate_rows(w_q, w_k, 4, 7, tokens=lambda size, generator: x)
    a = w_q.T @ w_k
    for r in range(7):
        for j in range(4):
            assert rows.scores[r, j].item() == pytest.approx((x[r, 0] @ a @ x[r, j]).item() / math.sqrt(3))
            assert rows.energy[r, j].item() == pytest.approx((a @ x[r, j]).square().sum().item())


def test_a_head_of_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="w_q and w_k must both be"):
        t.score_law(torch.zeros(3, 5), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="at least 2 tokens"):
        t.simulate_rows(torch.eye(3), torch.eye(3), 1)


# ---- Lemma 7.1


@pytest.mark.parametrize("seed", range(4))
def test_lemma_71_holds_for_gaussian_tokens(seed):
    assert t.check_lemma_71(*t.random_head(8, 12, gen(seed)), sigma=0.7, draws=8000, generator=gen(seed))["holds"]


def noise(size, g):
    return torch.randn(size, generator=g, dtype=torch.float64)


def copied(size, g):
    return noise(size, g)[:, :1].expand(size).clone()  # all tokens of a sequence are one


def uniform(size, g):
    return (torch.rand(size, generator=g, dtype=torch.float64) * 2 - 1) * math.sqrt(3)


@pytest.mark.parametrize(
    "tokens, which",
    [
        (lambda s, g: noise(s, g) + 0.5, "mean"),
        (lambda s, g: noise(s, g) * 1.2, "variance"),
        (copied, "mean"),
        (uniform, "conditional_law"),
        (lambda s, g: noise(s, g) * 1.2, "self_mean"),
    ],
    ids=["shifted", "wider", "copied", "uniform", "wider-self"],
)
def test_lemma_71_fails_when_its_tokens_do(tokens, which):
    head = (
        torch.eye(2, dtype=torch.float64),
        torch.eye(2, dtype=torch.float64),
    )  # few dimensions: no central limit to help
    found = t.check_lemma_71(*head, tokens=tokens, generator=gen())
    assert not found["holds"] and found[f"p_{which}"] < 1e-4


def test_a_score_is_no_gaussian_without_its_key():
    assert t.check_lemma_71(*t.random_head(8, 12, gen(), rank=1), generator=gen())["kurtosis"] > 2


# ---- Lemma B.1


def test_lemma_b1_holds_for_any_exchangeable_scores():
    heavy = torch.from_numpy(stats.t.rvs(3, size=(4000, 9), random_state=0)) + torch.randn(
        4000, 1, generator=gen()
    )  # a common shift too
    assert t.check_lemma_b1(heavy)["holds"]


def test_lemma_b1_fails_for_one_favoured_key_and_for_the_query_itself():
    scores = torch.randn(4000, 9, generator=gen(), dtype=torch.float64)
    scores[:, 3] += 0.3
    assert not t.check_lemma_b1(scores)["holds"]
    head = t.random_head(8, 12, gen())[0]
    rows = t.simulate_rows(head, head, 9, generator=gen())
    assert t.check_lemma_b1(rows.scores[:, 1:])["holds"] and not t.check_lemma_b1(rows.scores)["holds"]


# ---- Theorem 7.2


def test_weight_bounds_hold_and_would_not_for_half_the_spread(monkeypatch):
    scores = 5 * torch.randn(500, 7, generator=gen(), dtype=torch.float64)
    assert t.check_weight_bounds(scores)["holds"]
    spread = t.score_range
    monkeypatch.setattr(t, "score_range", lambda s: spread(s) / 2)
    assert not t.check_weight_bounds(scores)["holds"]


@pytest.mark.parametrize("rank, n", [(1, 2), (3, 4), (8, 6)])
def test_a1_happens_as_often_as_the_chi_square_law_says(rank, n):
    # A is a projection of rank r: ‖Ax‖² is chi-square with r degrees of freedom and has mean r
    eye = torch.eye(rank, 10, dtype=torch.float64)
    found = t.condition_a1(t.simulate_rows(eye, eye, n, 20_000, generator=gen()))
    want = stats.chi2.cdf(rank, rank) ** (n - 1)
    assert abs(found["rate"] - want) < 4 * math.sqrt(want * (1 - want) / 20_000)


def test_a2_depends_on_the_constant_only_where_it_can():
    biased = t.condition_a2(t.score_law(torch.eye(64), torch.eye(64)), n=64)
    assert not biased["holds"] and biased["largest_constant"] < 0  # fails whatever C is
    free = t.condition_a2(t.score_law(*selfless_head(8, 12, gen())), n=64, constant=1e9)
    assert free["holds"]  # holds whatever C is
    law = t.score_law(*t.random_head(16, 48, gen()))
    edge = t.condition_a2(law, 64)["largest_constant"]
    assert (
        t.condition_a2(law, 64, constant=0.999 * edge)["holds"]
        and not t.condition_a2(law, 64, constant=1.001 * edge)["holds"]
    )


def test_the_constant_two_is_enough_for_gaussian_quadratic_forms():
    for head in (t.random_head(16, 24, gen()), t.random_head(16, 24, gen(), rank=1), (torch.eye(4), torch.eye(4))):
        rows = t.simulate_rows(*head, n=2, draws=20_000, generator=gen(1))
        for delta in (0.5, 0.05, 0.005):
            unit = t.condition_a2(rows.law, 2, delta=delta, constant=1)["left"] - abs(rows.law.self_mean)

            def far(c):
                return ((rows.scores[:, 0] - rows.law.self_mean).abs() > c * unit).double().mean().item()

            assert far(2) <= delta and far(0.1) > delta


def test_theorem_72_where_its_conditions_hold():
    found = t.check_theorem_72(t.simulate_rows(*selfless_head(16, 24, gen()), n=3, draws=4000, generator=gen()))
    assert found["holds_given_conditions"] and found["coverage_given_conditions"]["of"] > 500

    # and not where there are conditions to hold but other tokens
    def wild(s, g):
        return noise(s, g) * torch.where(
            torch.rand(s[0], 1, 1, generator=g) < 0.1, 10**0.5, 0.0
        )  # variance 1 over sequences

    broken = t.check_theorem_72(
        t.simulate_rows(*t.random_head(16, 24, gen()), n=64, draws=4000, tokens=wild, generator=gen())
    )
    assert not broken["holds"] and not broken["holds_kappa"]


def test_the_bound_fails_for_a_concentrated_spectrum_and_kappa_repairs_it():
    found = t.check_theorem_72(
        t.simulate_rows(*t.random_head(16, 24, gen(), rank=1), n=64, draws=8000, generator=gen())
    )
    # rank one: Δ = |g| (max h − min h) σ_s with g and h normal
    g, h = np.random.default_rng(0).standard_normal(8000), np.random.default_rng(1).standard_normal((8000, 63))
    reference = (np.abs(g) * np.ptp(h, axis=1) <= 2 * math.sqrt(2 * math.log(2 * 64 / 0.05))).mean()
    assert not found["holds"] and found["coverage"]["rate"] < 0.95 and abs(found["coverage"]["rate"] - reference) < 0.03
    assert found["holds_kappa"] and found["a1"]["rate"] == 0 and found["holds_given_conditions"] is None


def test_delta_must_be_a_probability():
    with pytest.raises(ValueError, match="delta is a probability"):
        t.tail_bound(t.score_law(torch.eye(3), torch.eye(3)), 4, 1.5)


def test_remark_b2_calls_a_large_bias_small():
    found = t.self_bias(torch.eye(64, 128), torch.cat([torch.eye(9, 128), torch.zeros(55, 128)]))
    assert found["remark"] == pytest.approx(3 / 8) and found["in_sigma"] == pytest.approx(3) and not found["negligible"]


# ---- section 3.1


def exponential(size, g):
    return torch.empty(size).exponential_(generator=g)


def test_shift_formulas_hold_for_the_right_moments_only():
    def check(mean, var):
        return t.check_shift(exponential, mean, var, 0.3, 2.0, generator=gen())

    assert check(1, 1)["holds_rs"] and not check(1.05, 1)["holds_rs"] and not check(1, 1.1)["holds_rs"]


def test_cs_mode_does_not_reach_one_below_epsilon_nor_in_a_batch_of_equals():
    tiny = t.check_shift(lambda s, g: 1e-3 * torch.randn(s, generator=g), 0, 1e-6, 0, 1, generator=gen())
    same = t.check_shift(lambda s, g: torch.ones(s), 1, 1e-12, 0, 1, generator=gen())
    assert not tiny["holds_cs"] and not same["holds_cs"]
    assert tiny["cs_var"] == pytest.approx(1e-6 / (1e-6 + 1e-5), rel=0.05)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_the_layer_check_sees_a_layer_that_does_something_else():
    x, net = torch.randn(16, 3, 8, 8, generator=gen()), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert t.check_shift_layers(net, x)["holds"]
    net[1] = Doubled(4).eval()
    assert not t.check_shift_layers(net, x)["holds"]
    with pytest.raises(ValueError, match="no BatchNorm"):
        t.check_shift_layers(nn.Sequential(nn.Conv2d(3, 4, 3)), x)


# ---- Proposition 5.1


def test_the_irreducible_error_of_two_contexts_is_their_jensen_shannon_divergence():
    p = torch.rand(6, 2, 5, generator=gen(), dtype=torch.float64)
    p /= p.sum(-1, keepdim=True)
    want = [jensenshannon(*q.numpy()) ** 2 for q in p]
    assert t.irreducible_error(p).tolist() == pytest.approx(want)
    loss, student = t.best_invariant_student(p)
    assert loss.tolist() == pytest.approx(want, abs=1e-8) and (student - p.mean(1)).abs().max() < 1e-4


def test_no_other_student_does_better():
    p = torch.rand(4, 5, generator=gen(), dtype=torch.float64)
    p, w = p / p.sum(-1, keepdim=True), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)

    def kl(q):
        return float((w * (p * (p / q).log()).sum(1)).sum())

    floor = t.irreducible_error(p, w).item()
    for q in torch.rand(200, 5, generator=gen(1), dtype=torch.float64):
        assert kl(q / q.sum()) > floor
    assert kl((w[:, None] * p).sum(0)) == pytest.approx(floor)


def test_the_three_ways_part_when_one_is_wrong(monkeypatch):
    p, w = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]), [0.6, 0.3, 0.1]
    assert t.check_proposition_51(p, w, generator=gen())["holds"]
    right = t.irreducible_error
    monkeypatch.setattr(t, "irreducible_error", lambda probs, weights=None: right(probs))  # forgets the weights
    assert not t.check_proposition_51(p, w, generator=gen())["holds"]


def test_monte_carlo_brackets_the_truth():
    p = torch.rand(30, 4, generator=gen(), dtype=torch.float64)
    p /= p.sum(-1, keepdim=True)
    draws = [t.monte_carlo_error(p[torch.randint(30, (12,), generator=gen(s))]) for s in range(400)]
    low, high = (np.mean([d[k] for d in draws]) for k in ("low", "high"))
    assert low < t.irreducible_error(p).item() < high


def test_bad_contexts_are_refused():
    with pytest.raises(ValueError, match="probabilities of 3 contexts"):
        t.irreducible_error(torch.ones(3, 2) / 2, [0.5, 0.5])
    with pytest.raises(ValueError, match="at least 4 contexts"):
        t.monte_carlo_error(torch.ones(3, 2) / 2)
    with pytest.raises(ValueError, match="2 or more"):
        t.context_probabilities(None, None, None, batch=1)


def test_contexts_move_a_bn_network_in_cs_mode_and_nothing_else():
    draw = create_sampler("gaussian", (1, 8, 8))
    fixed = draw(2, generator=gen())
    for norm, mode, moves in (("bn", "cs", True), ("bn", "rs", False), ("ln", "cs", False)):
        net = create_model("wrn16", in_channels=1, image_size=8, width=1, norm=norm, seed=0)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        p = t.context_probabilities(net, fixed, draw, contexts=4, batch=16, mode=mode, generator=gen(1))
        assert (t.irreducible_error(p).min() > 1e-7) == moves and (t.error_share(p) > 1e-4) == moves
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training
