"""Scores read from real layers against what those layers themselves use; networks left as they were."""

import math

import numpy as np
import pytest
import torch

from nskd.theory.attention import (
    attention_layers,
    attention_report,
    attention_scores,
    materialised_attention,
    prefix_tokens,
    query_key_weights,
    row_statistics,
    similarity_entropy,
)
from nskd.models import create_model

MODELS = {
    "vit_tiny": dict(width=0.125),
    "swin_tiny": dict(width=0.25),
    "timm:vit_tiny_patch16_224": {},
    "timm:deit_tiny_distilled_patch16_224": {},
    "timm:swinv2_tiny_window8_256": {},
    "timm:beit_base_patch16_224": {},
}


def build(name, **kw):
    size = 32 if "swin" in name else 16
    return create_model(
        name, in_channels=1, image_size=size, seed=0, **{**MODELS.get(name, {}), **kw}
    ).eval(), torch.randn(3, 1, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["vit_tiny", "swin_tiny"])
def small(request):
    return build(request.param)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_do_not_change_and_flags_come_back(name):
    net, x = build(name)
    flags = [getattr(m, "fused_attn", None) for _, m in attention_layers(net)]
    seen = []
    with torch.no_grad():
        before = net(x)
        with materialised_attention(net, seen.append):
            during = net(x)
        after = net(x)
    assert (during - before).abs().max() < 1e-5 and torch.equal(before, after)
    assert flags == [getattr(m, "fused_attn", None) for _, m in attention_layers(net)]
    assert [s.name for s in seen] == [n for n, _ in attention_layers(net)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_everything_comes_back_after_an_exception(small):
    net, x = small
    flags = [m.fused_attn for _, m in attention_layers(net)]

    def stop(seen):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        with materialised_attention(net, stop):
            net(x)
    assert flags == [m.fused_attn for _, m in attention_layers(net)] and not any(
        m._forward_hooks or m._forward_pre_hooks for m in net.modules()
    )
    x.softmax(-1)  # and no spy is left behind
    attention_scores(net, x)


def test_the_entropy_is_that_of_the_weights_the_layer_uses(small):
    # attn_drop receives the layer's own weights, window mask and position bias included
    net, x = small
    used, handles = {}, []
    for name, m in attention_layers(net):
        handles.append(m.attn_drop.register_forward_hook(lambda m, a, o, name=name: used.__setitem__(name, a[0])))
    seen = attention_scores(net, x)
    for h in handles:
        h.remove()
    masked = 0
    for s in seen:
        a = used[s.name].double().numpy()
        want = -np.where(a > 1e-30, a * np.log(np.maximum(a, 1e-30)), 0).sum(-1)
        spread, entropy = row_statistics(s.scores, 0, s.blocked)
        np.testing.assert_allclose(entropy.numpy(), want, atol=1e-4)
        if s.blocked is not None and s.blocked.any():
            masked += 1
            assert spread.max() < 20  # the mask's −100 is no score
    assert masked == 0 or "Swin" in type(net).__name__
    if "Swin" in type(net).__name__:
        assert masked > 0


def test_cls_is_neither_query_nor_key():
    net, x = build("vit_tiny")
    assert prefix_tokens(net) == 1
    scores = attention_scores(net, x)[3].scores
    spread, entropy = row_statistics(scores, 1)
    s = scores[1, 2, 5, 1:].numpy()
    p = np.exp(s - s.max())
    p /= p.sum()
    assert spread.shape[-1] == scores.shape[-1] - 1
    assert spread[1, 2, 4].item() == pytest.approx(np.ptp(s), abs=1e-5) and entropy[1, 2, 4].item() == pytest.approx(
        -(p * np.log(p)).sum(), abs=1e-5
    )
    moved = scores.clone()
    moved[..., 0], moved[..., 0, :] = 1e4, -1e4
    assert torch.equal(row_statistics(moved, 1)[1], entropy)


def test_scores_of_a_network_without_queries_are_flat():
    net, x = build("vit_tiny")
    for _, m in attention_layers(net):
        torch.nn.init.zeros_(m.qkv.weight)
    blocks, _ = attention_report(net, x)
    assert (
        (blocks.spread == 0).all()
        and np.allclose(blocks.entropy, np.log(blocks["keys"]))
        and np.allclose(blocks.effective_keys, blocks["keys"])
    )


@pytest.mark.parametrize("bins", [2, 32, 128])
def test_similarity_entropy_is_the_histogram_entropy_of_all_ordered_pairs(bins):
    z = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(1))
    got = similarity_entropy(z, bins)
    for image, value in zip(z.numpy(), got):
        unit = image / np.linalg.norm(image, axis=1, keepdims=True)
        pairs = (unit @ unit.T)[~np.eye(10, dtype=bool)]
        p = np.histogram(pairs, bins, (-1, 1))[0] / len(pairs)
        assert value.item() == pytest.approx(-(p[p > 0] * np.log(p[p > 0])).sum(), abs=1e-5)
    assert (
        similarity_entropy(torch.ones(1, 5, 4), bins).item() == 0
        and similarity_entropy(torch.ones(2, 1, 4), bins).isnan().all()
    )


def test_a_report_does_not_depend_on_the_batch_size_and_agrees_with_the_scores(small):
    net, x = small
    (blocks, images), (other, _) = (
        attention_report(net, x, (16,), batch_size=3),
        attention_report(net, x, (16,), batch_size=1),
    )
    np.testing.assert_allclose(
        blocks.drop(columns="name").to_numpy(float), other.drop(columns="name").to_numpy(float), rtol=1e-4, atol=1e-5
    )
    for i, s in enumerate(attention_scores(net, x)):
        spread, entropy = row_statistics(s.scores, prefix_tokens(net), s.blocked)
        if blocks["keys"][i] < 2:
            assert math.isnan(blocks.spread[i])
            continue
        assert blocks.spread[i] == pytest.approx(spread.mean().item(), rel=1e-4) and blocks.spread_std[
            i
        ] == pytest.approx(spread.std(correction=0).item(), rel=1e-3, abs=1e-5)
        assert blocks.entropy[i] == pytest.approx(entropy.mean().item(), rel=1e-4)
        assert blocks.entropy_std[i] == pytest.approx(entropy.double().std(correction=0).item(), rel=1e-2, abs=1e-6)
    assert images.lpse_16.mean() == pytest.approx(blocks.pse_16.sum())


def test_query_key_weights_give_the_scores():
    net, x = build("vit_tiny")
    s = attention_scores(net, x)[2]
    for h in range(3):
        w = next(w for w in query_key_weights(net) if (w["block"], w["head"]) == (2, h))
        torch.testing.assert_close(
            s.inputs @ w["w_q"].T @ w["w_k"] @ s.inputs.mT / math.sqrt(len(w["w_q"])),
            s.scores[:, h],
            atol=1e-4,
            rtol=1e-4,
        )


def test_training_mode_and_weights_are_left_alone(small):
    net, x = small
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    attention_report(net, x)
    assert all(m.training for m in net.modules()) and all(
        torch.equal(v, before[k]) for k, v in net.state_dict().items()
    )
    net.eval()


def test_a_model_without_attention_gets_one_clear_sentence():
    for call in (attention_scores, attention_report):
        with pytest.raises(
            ValueError, match="WideResNet has no attention layers to look into: give a timm ViT or Swin"
        ) as e:
            call(create_model("wrn16", width=1), torch.zeros(1, 3, 32, 32))
        assert "\n" not in str(e.value)
