"""Theory, Table 8 and Table 9, at the smoke tier."""

import json

import pandas as pd
import pytest

from nskd.tables import attention, theory
from nskd.tables.attention import AttentionParameters
from nskd.experiments.parameters import check_parameters
from nskd.tables.theory import TheoryParameters
from test_tables import check_smoke_results

pytestmark = pytest.mark.filterwarnings("ignore")
CLAIMS = {"theory": 30, "table8": 16, "table9": 9}  # claims in each


@pytest.mark.parametrize("name", CLAIMS)
def test_smoke_run_leaves_its_results(smoke, name):
    base, done = smoke
    check_smoke_results(base, done, name, CLAIMS[name])
    assert (base / f"{name}.ipynb").stat().st_size < 300_000


def test_what_does_not_depend_on_training_has_its_verdict_at_once(smoke):
    verdict = {c["id"]: c["verdict"] for c in json.loads((smoke[0] / "theory/claims.json").read_text())}
    for id in (
        "lemma-7.1-moments",
        "lemma-7.1-conditional",
        "lemma-b1",
        "weight-bounds",
        "shift-rs",
        "shift-layers",
        "shift-cs",
        "prop-5.1-finite",
        "prop-5.1-zero",
    ):
        assert verdict[f"theory.{id}"] == "holds", id
    assert verdict["theory.shift-cs-any-input"] == "fails"  # (A1) fails as well, but over five seeds


def test_table_9_measures_nothing_that_table_8_has_measured(smoke):
    a, b = (pd.read_csv(smoke[0] / t / "records.csv") for t in ("table8", "table9"))
    assert b.cached.all()
    pd.testing.assert_frame_equal(a.drop(columns=["cached"]), b.drop(columns=["cached"]))


@pytest.mark.parametrize(
    "model, bad, words",
    [
        (AttentionParameters, dict(modles="vit_tiny"), "did you mean 'models'?"),
        (AttentionParameters, dict(bins=[1]), "greater than or equal to 2"),
        (AttentionParameters, dict(seeds=0), "seeds must be a number of seeds from 1 up"),
        (AttentionParameters, dict(weights="pretraind"), "did you mean 'pretrained'?"),
        (TheoryParameters, dict(sigmma=1), "did you mean 'sigma'?"),
        (TheoryParameters, dict(delta=1.0), "less than 1"),
        (TheoryParameters, dict(tokens=2), "greater than or equal to 3"),
    ],
)
def test_bad_parameters_are_one_sentence(model, bad, words):
    with pytest.raises(ValueError) as e:
        check_parameters(dict(bad), model)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_cnn_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("NSKD_OUTPUTS", str(tmp_path))
    with pytest.raises(ValueError, match="has no attention layers to look into"):
        attention.run(AttentionParameters(models="r18", seeds=1, workers=1))
    with pytest.raises(ValueError, match="has no attention layers to look into"):
        theory.run(TheoryParameters(model="r18", seeds=1, workers=1))
    with pytest.raises(ValueError, match="image_size goes with weights='pretrained'"):
        attention.run(AttentionParameters(image_size=32, seeds=1, workers=1))
    assert not any(tmp_path.iterdir())


def test_pretrained_weights_see_resized_images_in_their_own_channels(tmp_path, monkeypatch):
    import timm

    monkeypatch.setenv("NSKD_OUTPUTS", str(tmp_path))
    real, asked = timm.create_model, []

    def offline(name, pretrained=False, **kw):
        asked.append((name, pretrained))
        return real(name, pretrained=False, img_size=32, depth=2, embed_dim=48, num_classes=10)

    monkeypatch.setattr(timm, "create_model", offline)
    records = attention.run(
        AttentionParameters(
            models="timm:vit_tiny_patch16_224", weights="pretrained", image_size=32, images=4, seeds=1, workers=1
        )
    )
    assert asked == [("vit_tiny_patch16_224", True)] and len(records) == 4 and (records["keys"] == 4).all()
