"""Diagnostics against independent references: numpy and scipy, by hand, and teachers whose answers are known."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import special, stats
from scipy.spatial.distance import cdist
from torch import nn

from nskd.diagnostics.activations import (
    ActivationStatistics,
    activation_mismatch,
    activation_statistics,
    energy_coefficient,
)
from nskd.diagnostics.batch_context import BatchDependence, batch_dependence, fluctuation_correlation
from nskd.information import class_histogram, coverage, mutual_information, share_bounds
from nskd.models import create_model
from nskd.samplers import create_sampler
from nskd.tables.contexts import flip_rates_possible


class Known(nn.Module):
    "A teacher whose class is the rank of its input's first pixel among fixed cuts: class shares are known exactly."

    def __init__(self, shares):
        super().__init__()
        self.cuts = nn.Parameter(torch.tensor(stats.norm.ppf(np.cumsum(shares)[:-1]), dtype=torch.float32))
        self.classes = len(shares)

    def forward(self, x):
        label = torch.bucketize(x[:, 0, 0, 0].contiguous(), self.cuts)
        return 5 * nn.functional.one_hot(label, self.classes).float()


def noise():
    return create_sampler("gaussian", (1, 4, 4))


@pytest.fixture
def bn_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5), nn.BatchNorm1d(5)
    )
    with torch.no_grad():
        net(torch.randn(64, 1, 4, 4) + 1)
    return net.eval()


def test_mutual_information_is_numpys():
    rng = np.random.default_rng(0)
    batches = [rng.normal(0, 3, (200, 7)) for _ in range(3)]
    p = [special.softmax(z, axis=1) for z in batches]
    marginal = np.mean([stats.entropy(q.mean(0)) for q in p])
    conditional = np.mean([stats.entropy(q, axis=1).mean() for q in p])
    got = mutual_information([torch.tensor(z) for z in batches])
    np.testing.assert_allclose(
        [got.marginal_entropy, got.conditional_entropy, got.mutual_information],
        [marginal, conditional, marginal - conditional],
        atol=1e-12,
    )
    stacked = mutual_information(torch.tensor(np.stack(batches)))  # (batches, B, classes) is a sequence of batches
    assert stacked == got


def test_mutual_information_survives_huge_logits():
    got = mutual_information(torch.tensor([[1e4, 0, 0], [0, 1e4, 0]]))
    assert got.mutual_information == pytest.approx(math.log(2)) and got.conditional_entropy == 0


def test_class_histogram_finds_known_shares():
    shares = [0.5, 0.3, 0.15, 0.05]
    h = class_histogram(Known(shares), noise(), 20_000, "rs", batch_size=512, generator=0)
    assert stats.chisquare(h.counts.numpy(), 20_000 * np.array(shares)).pvalue > 1e-3
    assert h.counts.sum() == h.n == 20_000 and h.missing_classes == 0
    assert h.required_k == pytest.approx(20_000 / (4 * h.counts[3].item()))
    assert h.effective_classes == pytest.approx(math.exp(stats.entropy(h.counts.numpy())))
    top = math.exp(5) / (math.exp(5) + 3)
    np.testing.assert_allclose(h.soft, h.hard.numpy() * top + (1 - h.hard.numpy()) * (1 - top) / 3, atol=1e-6)


def test_class_histogram_leaves_the_teacher_alone(bn_net):
    before = {k: v.clone() for k, v in bn_net.state_dict().items()}
    class_histogram(bn_net, noise(), 300, "cs", generator=0)
    assert all(torch.equal(v, before[k]) for k, v in bn_net.state_dict().items()) and not bn_net.training


def test_coverage_is_a_count_and_its_interval_covers():
    shares = np.array([0.6, 0.3, 0.09, 0.01])
    true_k = 1 / (4 * shares.min())
    inside = 0
    for seed in range(60):
        rows = coverage(Known(shares), noise(), (50, 400), "rs", generator=seed)
        inside += ((rows.required_k_low <= true_k) & (true_k <= rows.required_k_high)).all()
        assert (rows.max_over_expected == rows["max"] * 4 / rows.samples).all()
        assert ((rows["min"] == 0) == (rows.zero_classes > 0)).all() and (
            rows.unseen_below.isna() == (rows["min"] > 0)
        ).all()
    assert inside >= 54  # 95 %, conservative


def test_share_bounds_are_clopper_and_pearsons():
    for count, n, classes in ((0, 100, 1), (3, 100, 10), (100, 100, 5)):
        exact = stats.binomtest(count, n).proportion_ci(1 - 0.05 / classes, "exact")
        assert share_bounds(count, n, classes) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_more_classes_than_samples_is_one_sentence():
    with pytest.raises(
        ValueError, match=r"^3 samples can't cover 4 classes: give at least as many samples as there are classes$"
    ):
        coverage(Known([0.25] * 4), noise(), (3, 100), "rs", generator=0)


def test_batch_dependence_by_hand(bn_net):
    d = batch_dependence(bn_net, noise(), contexts=6, others=9, inputs=2, mode="cs", generator=4)
    g = torch.Generator().manual_seed(4)
    for i in range(2):
        x0 = torch.randn(1, 1, 4, 4, generator=g)
        for c, seed in enumerate(torch.randint(2**62, (6,), generator=g).tolist()):
            batch = torch.cat((x0, torch.randn(9, 1, 4, 4, generator=torch.Generator().manual_seed(seed))))
            with torch.no_grad():
                z = bn_net.train()(batch)[0]
                bn_net.eval()
            torch.testing.assert_close(d.logits[i, c], z)


def test_dependence_numbers_by_hand():
    labels = [[0, 0, 1, 2], [3, 3, 3, 3]]
    d = BatchDependence(4 * nn.functional.one_hot(torch.tensor(labels), 4).float())
    assert d.flip_rates.tolist() == pytest.approx([5 / 6, 0]) and d.flip_rate == pytest.approx(5 / 12)
    assert d.off_mode == pytest.approx(0.25) and d.classes == [0, 1, 2]
    assert d.prob_variance == pytest.approx(special.softmax(d.logits.numpy(), axis=2).var(axis=1).mean())


def test_a_batch_of_its_own_context_only_varies_by_company():
    ln = create_model("wrn16", 5, 1, 8, norm="ln", width=1, seed=0)
    d = batch_dependence(ln, create_sampler("gaussian", (1, 8, 8)), contexts=4, others=5, mode="rs", generator=0)
    assert d.flip_rate == 0 and (d.probabilities - d.probabilities[:, :1]).abs().max() < 1e-6


def test_fewer_inputs_are_a_prefix(bn_net):
    few, many = (
        batch_dependence(bn_net, noise(), contexts=3, others=7, inputs=n, mode="cs", generator=1) for n in (1, 3)
    )
    assert torch.equal(few.logits, many.logits[:1])


def test_correlation_is_scipys():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(2, 8, 5))
    b = 0.5 * a + rng.normal(size=a.shape)
    centred = [(t - t.mean(1, keepdims=True)).ravel() for t in (a, b)]
    got = fluctuation_correlation(*(BatchDependence(torch.tensor(t)) for t in (a, b)))
    assert got == pytest.approx(stats.pearsonr(*centred).statistic)


def test_activation_statistics_by_hand(bn_net):
    x = torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    h = bn_net[0](x).detach().numpy()  # (10, 6, 2, 2)
    for mode in ("rs", "cs"):
        mean, var = (
            (bn_net[1].running_mean.numpy(), bn_net[1].running_var.numpy())
            if mode == "rs"
            else (h.mean((0, 2, 3)), h.var((0, 2, 3)))
        )
        act = np.maximum((h - mean[:, None, None]) / np.sqrt(var + 1e-5)[:, None, None], 0)
        got = activation_statistics(bn_net, x, mode)
        np.testing.assert_allclose(got.mean, act.mean((2, 3)), atol=1e-5)
        np.testing.assert_allclose(got.variance, act.var((2, 3)), atol=1e-5)


def test_energy_coefficient_by_hand_and_its_range():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 2)), rng.normal(2, 1, size=(50, 2))
    s = np.concatenate((x, y)).std(0)
    between = 2 * cdist(x / s, y / s).mean()
    within = [cdist(t / s, t / s).sum() / (len(t) * (len(t) - 1)) for t in (x, y)]
    assert energy_coefficient(torch.tensor(x), torch.tensor(y)) == pytest.approx(1 - sum(within) / between)
    assert energy_coefficient(torch.zeros(5, 2), torch.zeros(5, 2)) == 0
    assert energy_coefficient(torch.zeros(5, 2), torch.ones(5, 2)) == 1
    same = [energy_coefficient(*torch.randn(2, 40, 2, generator=torch.Generator().manual_seed(i))) for i in range(40)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(40)  # unbiased

    def stats_(m):
        return ActivationStatistics(m, m**2, "1")

    a, b = torch.rand(20, 3), torch.rand(20, 3) + 1
    assert activation_mismatch(stats_(a), stats_(b)) == pytest.approx(activation_mismatch(stats_(b), stats_(a)))


def test_a_network_without_batch_norm_is_one_sentence():
    with pytest.raises(ValueError, match="^this network has no BatchNorm: [^\n]*$"):
        activation_statistics(create_model("vit_tiny", 10, 1, 8, width=1 / 8), torch.zeros(2, 1, 8, 8))


def test_the_papers_flip_rates_are_no_shares_of_pairs():
    possible = flip_rates_possible(30)
    assert not {10.0, 26.7, 40.0} & possible and {0.0, 6.7, 100.0} - possible == {100.0}  # ten classes can't all differ


@pytest.mark.parametrize("name", ["perlin", "dead_leaves"])
def test_structured_noise_is_standardised_smooth_and_reproducible(name):
    draw = create_sampler(name, (3, 32, 32))
    x = draw(64, generator=torch.Generator().manual_seed(0))
    assert x.shape == (64, 3, 32, 32) and x.dtype == torch.float32
    assert x.mean((2, 3)).abs().max() < 1e-5 and ((x.var((2, 3), correction=0) - 1).abs() < 1e-3).float().mean() > 0.98
    assert torch.equal(x, draw(64, generator=torch.Generator().manual_seed(0)))
    neighbours = (x[..., 1:] * x[..., :-1]).mean()
    assert neighbours > 0.5  # white noise has 0
    assert draw(2, generator=torch.Generator().manual_seed(1)).ne(x[:2]).any()


@pytest.mark.parametrize(
    "first", ["import nskd.diagnostics.preflight", "import nskd.diagnostics", "from nskd.tables import track_record"]
)
def test_the_public_names_are_functions_whatever_was_imported_first(repo, first):
    code = f"""{first}
import nskd.diagnostics.preflight
from nskd.diagnostics import batch_dependence, class_histogram, mutual_information, preflight
functions = batch_dependence, class_histogram, mutual_information, preflight, nskd.diagnostics.preflight
assert all(type(f).__name__ == "function" for f in functions), functions
"""
    subprocess.run([sys.executable, "-c", code], cwd=repo, check=True)
