"""The practitioner's notebook, run by papermill as they would: a teacher that is known by its file alone, and what
can be wrong with it.
"""

import json
import re

import pytest
import torch

from nskd.practice.handover import demo_teacher
from nskd.data import load_dataset
from nskd.practice.export import export_program, load_student
from nskd.models import create_model
from nskd.norms import norm_kinds
from nskd.engine.files import save_tensors
from nskd.teachers import TeacherRecipe, train_teacher
from test_tables import check_refused, papermill, run_here

QUICK = [
    "-p",
    "steps",
    "4",
    "-p",
    "batch_size",
    "64",
    "-p",
    "k",
    "2",
    "-p",
    "eval_every",
    "2",
    "-p",
    "preflight_seconds",
    "1",
    "-p",
    "force",
    "True",
    "-p",
    "student_width",
    "1",
]


# A network of this repository that is known by its file alone, twice; and one of another library, with random
# weights, for the mechanics.
WAYS = {
    "program": ["-p", "teacher", "mine.pt2", "-p", "test_data", "digits"],
    "weights": [
        "-p",
        "teacher",
        "mine.safetensors",
        "-p",
        "architecture",
        "wrn28",
        "-y",
        "architecture_options: {width: 1}",
        "-p",
        "recalibrate",
        "perlin",
    ],
    "timm": [
        "-p",
        "teacher",
        "timm:resnet10t",
        "-y",
        "architecture_options: {pretrained: false, num_classes: 7}",
        "-p",
        "input_shape",
        "3,32,32",
        "-p",
        "student_norm",
        "gn",
    ],
}


@pytest.fixture(scope="module")
def runs(repo, tmp_path_factory):
    "Each of them the whole way to a folder, one by papermill: (folder, {way: how it ended})."
    base = tmp_path_factory.mktemp("distill")
    demo_teacher(base / "mine.pt2", norm="ln", epochs=1)
    bn = train_teacher(
        "wrn28",
        load_dataset("digits"),
        norm="bn",
        width=1,
        recipe=TeacherRecipe(epochs=1),
        device="cpu",
        progress=False,
    )
    save_tensors(base / "mine.safetensors", bn.state_dict())
    runs = {"program": papermill, "weights": run_here, "timm": run_here}
    return base, {
        way: run(repo, "distill", base / f"{way}.ipynb", *WAYS[way], "-p", "run", way, *QUICK)
        for way, run in runs.items()
    }


@pytest.mark.parametrize(
    "way, kind, norms, shape, classes",
    [
        ("program", "pt2", "GroupNorms|LayerNorms", (1, 8, 8), 10),
        ("weights", "weights", "BatchNorms", (1, 8, 8), 10),
        ("timm", "timm", "BatchNorms", (3, 32, 32), 7),
    ],
)
def test_the_whole_way_from_a_teacher_to_a_folder(runs, way, kind, norms, shape, classes):
    base, done = runs
    assert done[way].returncode == 0, done[way].stderr[-2000:]
    folder = base / f"distilled/{way}/student"
    assert {f.name for f in folder.iterdir()} == {
        "student.safetensors",
        "student.json",
        "student.pt2",
        "student.onnx",
        "README.md",
    }
    card = json.loads((folder / "student.json").read_text())
    assert card["ledger"]["data_free"] and card["state"] == "finished" and card["teacher"]["kind"] == kind
    assert ("accuracy" in card) == (way == "program") and re.search(norms, card["teacher"]["possible"])
    student = load_student(folder)
    assert student(torch.zeros(2, *shape)).shape == (2, classes) and card["norms"]["bn"] == (
        0 if way == "timm" else norm_kinds(student)["bn"]
    )
    text = (folder / "README.md").read_text()
    assert "data free: True" in text and ("one image at a time" in text) == (way != "program") and "verdict" in text
    assert ("its statistics are those of perlin" in text) == (way == "weights")


def test_a_budget_stops_and_goes_on(repo, runs, tmp_path):
    base, _ = runs
    args = ["-p", "teacher", base / "mine.pt2", "-p", "run", "parts", *QUICK]
    first = run_here(repo, "distill", tmp_path / "first.ipynb", *args, "-p", "budget_seconds", "1e-9")
    assert first.returncode == 0 and "unfinished after" in (tmp_path / "first.ipynb").read_text(), first.stderr[-1500:]
    second = run_here(repo, "distill", tmp_path / "second.ipynb", *args)
    assert second.returncode == 0 and "finished after 4 steps" in (tmp_path / "second.ipynb").read_text(), (
        second.stderr[-1500:]
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A folder of teachers, good and bad."
    folder = tmp_path_factory.mktemp("files")
    net = create_model("wrn16", 10, 1, 8, width=1, seed=0)
    save_tensors(folder / "weights.safetensors", net.state_dict())
    export_program(net, (1, 8, 8), folder / "net.pt2")
    (folder / "cut.pt2").write_bytes((folder / "net.pt2").read_bytes()[:-2000])
    return folder


@pytest.mark.parametrize(
    "args, words",
    [
        (["-p", "teacher", "nowhere.pt2"], "there is no file nowhere.pt2"),
        (["-p", "teacher", "weights.safetensors"], "holds weights only"),
        (["-p", "teacher", "weights.safetensors", "-p", "architecture", "wrn61"], "did you mean 'wrn16'"),
        (["-p", "teacher", "cut.pt2"], "is damaged or was not copied in full"),
        (
            [
                "-p",
                "teacher",
                "weights.safetensors",
                "-p",
                "architecture",
                "wrn16",
                "-y",
                "architecture_options: {width: 1}",
                "-p",
                "recalibrate",
                "no/folder",
            ],
            "there is no folder no/folder",
        ),
        (["-p", "input_shape", "3,32"], "input_shape must be channels,height,width"),
        (["-p", "run", "a/b"], "without slashes"),
        (["-p", "techer", "x"], "did you mean 'teacher'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(repo, files, tmp_path, args, words):
    check_refused(repo, tmp_path, "distill", args, words, folder=files)
