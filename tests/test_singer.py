"""SiNGER's notebooks at the smoke tier, the pieces on other ViTs of timm, and what is refused."""

import pandas as pd
import pytest
import torch

from nskd.singer.artifacts import amplified, artifact_report, artifact_unit, emptiest_patches, plant_artifacts
from nskd.models import create_model
from nskd.singer.adapter import (
    Singer,
    SingerAdapter,
    block_features,
    left_nullspace,
    linearised_ffn,
    transformer_blocks,
)
from test_tables import check_refused, check_smoke_results

CLAIMS = {"singer_table1": 21, "singer_table4": 23, "singer_figures": 14}


@pytest.mark.parametrize("name", CLAIMS)
def test_smoke_runs_succeed_and_leave_their_results(smoke, name):
    base, done = smoke
    check_smoke_results(base, done, name, CLAIMS[name])
    assert set(pd.read_csv(base / name / "records.csv").seed) == {0}


@pytest.mark.parametrize(
    "name, args, words",
    [
        ("singer_table1", ["-p", "alpha", "1.0"], "the percentile alpha must lie between 0 and 1"),
        ("singer_table1", ["-p", "rank", "99"], "rank must be at most the teacher's width 48, not 99"),
        (
            "singer_table4",
            ["-p", "teacher", "wrn16", "-p", "width", "paper"],
            "WideResNet has no sequence of transformer blocks",
        ),
        ("singer_figures", ["-p", "plant_layr", "3"], "did you mean 'plant_layer'?"),
    ],
)
def test_bad_parameters_fail_at_once_in_one_sentence(repo, tmp_path, name, args, words):
    check_refused(repo, tmp_path, name, args, words)


@pytest.mark.parametrize(
    "name",
    [
        "timm:vit_tiny_patch16_224",
        "timm:deit_tiny_distilled_patch16_224",
        "timm:deit3_small_patch16_224",
        "timm:vit_small_patch14_reg4_dinov2",
    ],
)
def test_other_vits_of_timm(name):
    size = 28 if "14" in name else 32
    teacher, student = (
        create_model(name, in_channels=1, image_size=size, seed=0).eval(),
        create_model("vit_tiny", in_channels=1, image_size=size, width=0.125, seed=1),
    )
    x = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = block_features(teacher, x)
    assert sorted(features) == list(range(12)) and features[0].shape[-1] == teacher.embed_dim
    d = teacher.embed_dim
    assert linearised_ffn(teacher, 5).shape == (d, d)
    singer = Singer(teacher, student, [8, 11], rank=4)
    refined = singer.refine(features)
    assert (
        torch.equal(refined[8][:, : singer.prefix], features[8][:, : singer.prefix])
        and singer.prefix == teacher.num_prefix_tokens
    )
    with torch.no_grad():
        assert torch.equal(singer.follow({8: features[8]} | {11: features[11]})[8], features[9])


def test_an_adapter_takes_one_decomposition(monkeypatch):
    "At a ViT-L's width that is all its start costs."
    svd, shapes = torch.linalg.svd, []

    def counted(w, *args, **kwargs):
        shapes.append(tuple(w.shape))
        return svd(w, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    SingerAdapter(torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)))
    assert shapes == [(1024, 1024)]


def test_a_gated_ffn_is_refused_in_one_sentence():
    net = create_model("timm:eva02_tiny_patch14_224", in_channels=1, image_size=28)
    assert len(transformer_blocks(net)) == 12
    with pytest.raises(ValueError, match="no FFN of two linear layers fc1 and fc2") as e:
        linearised_ffn(net, 3)
    assert "\n" not in str(e.value)


def test_planting_is_one_hidden_unit_of_one_block():
    net = create_model("vit_tiny", in_channels=1, image_size=16, width=0.125, seed=0).eval()
    x = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = net(x).argmax(1)
    new = plant_artifacts(net, x, labels, 5, most=100.0)
    changed = {
        k: new.state_dict()[k] - v for k, v in net.state_dict().items() if not torch.equal(v, new.state_dict()[k])
    }
    assert set(changed) == {f"blocks.5.mlp.{k}" for k in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
    assert (
        torch.count_nonzero(changed["blocks.5.mlp.fc1.weight"].abs().sum(1)) == 1
        and torch.count_nonzero(changed["blocks.5.mlp.fc1.bias"]) == 1
    )
    written = changed["blocks.5.mlp.fc2.weight"].abs().sum(0).nonzero().flatten()
    assert len(written) == 1
    u = torch.linalg.svd(linearised_ffn(net, 5))[2][0]  # along the leading direction of what the FFN writes
    assert abs(torch.nn.functional.cosine_similarity(new.blocks[5].mlp.fc2.weight[:, written[0]], u, dim=0)) > 0.999
    assert new.planted["accuracy_before"] == 100 and new.planted["excess_after"] >= 6 > 2 * new.planted["excess_before"]
    before, after = artifact_report(net, x), artifact_report(new, x)
    assert (before.excess - after.excess)[:5].abs().max() < 1e-5 and (after.excess > before.excess)[5:].all()


def test_planting_that_costs_too_much_is_refused_in_one_sentence():
    net = create_model("vit_tiny", in_channels=1, image_size=16, width=0.125, seed=0).eval()
    x = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = net(x).argmax(1)
    with pytest.raises(
        ValueError,
        match="planting in block 5 costs .* points of accuracy, more than 0.01: try another block or a smaller excess",
    ) as e:
        plant_artifacts(net, x, labels, 5, excess=50, most=0.01, gains=(1e4,))
    assert "\n" not in str(e.value)
    with pytest.raises(
        ValueError, match="makes the longest patch .* times the median one at a gain of 0.5, not 6.0"
    ) as e:
        plant_artifacts(net, x, labels, 5, gains=(0.25, 0.5))
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="a layer must be a whole number from 0 to 11"):
        plant_artifacts(net, x, labels, 12)


def test_the_unit_opens_in_empty_patches_alone():
    net = create_model("vit_tiny", in_channels=1, image_size=16, width=0.125, seed=0).eval()
    x = torch.randn(200, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    x[:, :, :4, :4] = 0  # four empty patches of 64, always the same
    chosen = emptiest_patches(net, x, 4 / 64)
    assert chosen.sum(1).eq(4).all() and chosen.view(-1, 8, 8)[:, :2, :2].all()
    found = artifact_unit(net, x, 3, share=4 / 64)
    assert abs(float(found["write"].norm()) - 1) < 1e-5
    gone, new = amplified(net, 3, found, 0.0), amplified(net, 3, found, 100.0)
    with torch.no_grad():
        plain, without, f = (block_features(n, x, [3])[3] for n in (net, gone, new))
        moved = (f - without) / 100
        assert (
            moved - (moved @ found["write"])[..., None] * found["write"]
        ).abs().max() < 1e-5  # along u and nowhere else
        assert (without - plain).norm() < 0.1 * plain.norm()  # the unit that it takes the place of is hardly missed
        moved = moved.norm(dim=-1)
        others = moved[:, 1:][~chosen]
        assert (
            moved[:, 1:][chosen].median() > 0.4 and others.quantile(0.95) < 0.1 and moved[:, 0].max() < 0.05
        )  # [CLS] stays; patches of noise can look alike
    assert (
        left_nullspace(linearised_ffn(new, 3), 2).singular_values[0]
        > left_nullspace(linearised_ffn(net, 3), 2).singular_values[0]
    )
