"""The norms' promises on whole networks: nothing moves, alpha = 0 is nothing, alpha = 1 is batch normalisation."""

import copy

import pytest
import torch
from torch import nn

from nskd.models import create_model
from nskd.norms import align_batch, bn_mode, norm_kinds, replace_norm, set_alpha, teacher_context, unalign

NARROW = {"r18": 8, "wrn16": 1, "mv2": 0.25, "convnext_small": 0.1, "vit_tiny": 0.25, "swin_tiny": 0.25}


def net_of(name, norm=None, image_size=16):
    net = create_model(name, in_channels=3, image_size=image_size, norm=norm, width=NARROW.get(name), seed=0)
    with torch.no_grad():  # affine maps that are not the identity, statistics that are not the initial ones
        for m in net.modules():
            if getattr(m, "weight", None) is not None and m.weight.dim() == 1:
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_()
    return net


def snapshot(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def unchanged(before, net):
    return all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    "name", ["r18", "wrn16", "mv2", "timm:resnet18d", "timm:efficientnet_b0", "torchvision:resnet18"]
)
def test_cs_forwards_leave_every_buffer_bit_identical(name):
    net = net_of(name, image_size=32)
    before, x = snapshot(net), torch.randn(8, 3, 32, 32)
    modes = [m.training for m in net.modules()]
    for _ in range(3):
        with bn_mode(net, "cs"), torch.no_grad():
            z = net(x)
    with pytest.raises(RuntimeError, match="half way"):
        with bn_mode(net, "cs"):
            net(x)
            raise RuntimeError("half way")
    assert unchanged(before, net)
    assert [m.training for m in net.modules()] == modes
    assert all(m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    with bn_mode(net, "cs"), torch.no_grad():
        assert torch.equal(net(x), z)  # no dropout, no stochastic depth
    with bn_mode(net, "rs"), torch.no_grad():
        assert not torch.allclose(net(x), z)


def test_gradients_flow_in_cs_mode_and_nothing_else_changes():
    net, x = net_of("wrn16"), torch.randn(4, 3, 16, 16)
    before = snapshot(net)
    with bn_mode(net, "cs"):
        net(x).sum().backward()
    assert net.stem.weight.grad is not None and unchanged(before, net)


@pytest.mark.parametrize(
    "name, norm",
    [
        ("r18", "ln"),
        ("r18", "gn"),
        ("wrn16", "ln"),
        ("mv2", "gn"),
        ("convnext_small", None),
        ("vit_tiny", None),
        ("swin_tiny", None),
        ("torchvision:swin_t", None),
        ("torchvision:convnext_tiny", None),
        ("timm:resnet10t", "ln"),
        ("timm:convnextv2_atto", None),
    ],
)
def test_alpha_zero_is_the_unwrapped_network_bit_for_bit(name, norm):
    size = 32 if ":" in name else 16
    net, x = net_of(name, norm, size).eval(), torch.randn(4, 3, size, size)
    with torch.no_grad():
        plain = net(x)
        count, names = sum(norm_kinds(net)[k] for k in ("ln", "gn")), list(dict(net.named_parameters()).values())
        assert align_batch(net, 0) is net
        assert norm_kinds(net)["aligned"] == count > 0
        assert torch.equal(net(x), plain)
        assert all(p is q for p, q in zip(names, net.parameters()))  # the same weights, none added
        aligned = set_alpha(net, 0.5)(x)
        assert not torch.allclose(aligned, plain, atol=1e-4)
        assert torch.equal(net(x[:1]), unalign(copy.deepcopy(net))(x[:1]))  # a batch of one falls back
        assert torch.equal(unalign(net)(x), plain)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_aligned_group_norm_is_batch_norm_composed_after_it(alpha):
    torch.manual_seed(0)
    norm, x = nn.GroupNorm(1, 6), torch.randn(16, 6, 5, 5) * torch.arange(1, 7).view(6, 1, 1) + 2
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
        plain = nn.GroupNorm(1, 6, affine=False)(x)
        bn = nn.BatchNorm2d(6, affine=False)
        with bn_mode(bn, "cs"):
            composed = bn(plain)
        shape = (1, 6, 1, 1)
        expected = norm.weight.view(shape) * ((1 - alpha) * plain + alpha * composed) + norm.bias.view(shape)
        torch.testing.assert_close(align_batch(copy.deepcopy(norm), alpha)(x), expected, atol=2e-5, rtol=1e-5)
    # alpha = 1: BatchNorm in CS mode with the layer's own affine map, composed after the affine-free norm
    affine = nn.BatchNorm2d(6)
    affine.load_state_dict({**affine.state_dict(), "weight": norm.weight, "bias": norm.bias})
    with bn_mode(affine, "cs"), torch.no_grad():
        torch.testing.assert_close(align_batch(copy.deepcopy(norm), 1)(x), affine(plain), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "shape, norm, axis",
    [
        ((32, 12, 6, 6), nn.GroupNorm(1, 12), 1),
        ((32, 12, 6, 6), nn.GroupNorm(3, 12), 1),
        ((32, 6, 6, 12), nn.LayerNorm(12), 3),
        ((32, 9, 12), nn.LayerNorm(12), 2),
        ((64, 12), nn.LayerNorm(12), 1),
    ],
)
def test_alpha_one_standardises_every_channel(shape, norm, axis):
    x = torch.randn(shape) * 5 + torch.arange(12.0).view([-1 if d == axis else 1 for d in range(len(shape))])
    y = align_batch(norm, 1)(x)  # a fresh norm's affine map is the identity
    dims = [d for d in range(len(shape)) if d != axis]
    assert y.mean(dims).abs().max() < 1e-5
    assert (y.var(dims, correction=0) - 1).abs().max() < 1e-2


def test_alignment_is_differentiable_and_alpha_is_checked():
    net, x = align_batch(net_of("wrn16", "ln"), 0.5), torch.randn(4, 3, 16, 16, requires_grad=True)
    net(x).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    for bad in (-0.1, 1.1, float("nan"), "half"):
        with pytest.raises(ValueError, match="between 0 and 1"):
            set_alpha(net, bad)
    with pytest.raises(ValueError, match="has none"):
        align_batch(net_of("wrn16"))


def test_teacher_context_restores_on_an_exception():
    net = net_of("wrn16", "ln")
    with pytest.raises(RuntimeError):
        with teacher_context(net, "aligned", 0.5):
            raise RuntimeError
    assert norm_kinds(net)["aligned"] == 0 and net.training


@pytest.mark.parametrize("name, layers", [("r34", 36), ("wrn28", 25), ("mv2", 57)])
def test_replacing_from_the_output_by_quarters(name, layers):
    for share in (0, 0.25, 0.5, 0.75, 1):
        net = create_model(name, image_size=8, width={"r34": 8, "wrn28": 1, "mv2": 0.25}[name])
        count = sum(p.numel() for p in net.parameters())
        replaced = replace_norm(net, "ln", share)
        assert len(replaced) == round(share * layers) and norm_kinds(net)["ln"] == len(replaced)
        assert sum(p.numel() for p in net.parameters()) == count
        assert net.eval()(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    first = {"r34": "bn1", "wrn28": "blocks.0.norm1", "mv2": "stem.1"}[name]
    last = {"r34": "layer4.2.bn2", "wrn28": "norm", "mv2": "head.1"}[name]
    assert replaced[-1] == first and replaced[0] == last


def test_gradients_of_alignment_include_its_statistics():
    torch.manual_seed(0)
    for norm, shape in ((nn.GroupNorm(2, 4), (3, 4, 2, 2)), (nn.LayerNorm(4), (3, 2, 4))):
        for alpha in (0.5, 1.0):
            layer = align_batch(copy.deepcopy(norm), alpha)
            x = torch.randn(shape)

            def f(t):
                return layer(t).square().sum() + layer(t)[0].sum()

            x.requires_grad_()
            (grad,) = torch.autograd.grad(f(x), x)
            direction, step = torch.randn(shape), 1e-2
            numeric = (f(x + step * direction) - f(x - step * direction)) / (2 * step)
            assert (grad * direction).sum().item() == pytest.approx(numeric.item(), rel=2e-2, abs=2e-2)


def test_alignment_is_not_bypassed_by_the_fused_transformer_layer():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(4, 5, 16)
    with torch.no_grad():
        plain = layer(x)
        assert not torch.allclose(align_batch(layer, 1)(x), plain, atol=1e-3)
        torch.testing.assert_close(unalign(layer)(x), plain)


def test_a_teacher_that_came_aligned_is_plain_in_the_other_modes():
    net, x = net_of("wrn16", "ln"), torch.randn(4, 3, 16, 16)
    with teacher_context(net, "rs"), torch.no_grad():
        plain = net(x)
    align_batch(net, 0.7)
    with teacher_context(net, "rs"), torch.no_grad():
        assert torch.equal(net(x), plain)
    with teacher_context(net, "aligned", 0.2):
        assert {m.alpha for m in net.modules() if hasattr(m, "alpha")} == {0.2}
    assert {m.alpha for m in net.modules() if hasattr(m, "alpha")} == {0.7}


def test_a_partly_aligned_teacher_comes_back_partly_aligned():
    net = net_of("wrn16", "ln")
    net.norm = align_batch(net.norm, 0.3)
    with teacher_context(net, "aligned", 0.5):
        assert norm_kinds(net)["aligned"] == norm_kinds(net)["ln"]
    assert norm_kinds(net)["aligned"] == 1 and net.norm.alpha == 0.3


def test_names_of_layer_norms_on_nchw():
    from timm.layers import LayerNorm2d, LayerNorm2dFp32

    for kind in (LayerNorm2d, LayerNorm2dFp32):
        y = align_batch(kind(5), 1)(torch.randn(16, 5, 5, 5) * 3 + torch.arange(5.0).view(5, 1, 1))
        assert y.mean((0, 2, 3)).abs().max() < 1e-5


def test_replacing_norms_without_statistics_or_in_another_precision():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).bfloat16()
    replace_norm(net, "ln")
    assert norm_kinds(net)["ln"] == 1 and net[1].weight.dtype == torch.bfloat16
