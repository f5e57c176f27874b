"""The practitioner's notebook, run by papermill as they would: a teacher that is known by its file alone, and what can be wrong with it."""
import json

import pytest
import torch

from nskd.bring import demo_teacher
from nskd.export import load_student
from nskd.models import create_model
from nskd.runs import save_tensors
from test_tables import papermill

QUICK = ["-p", "steps", "4", "-p", "batch_size", "64", "-p", "k", "2", "-p", "eval_every", "2", "-p", "preflight_seconds", "1", "-p", "force", "True"]


@pytest.fixture(scope="module")
def run(repo, tmp_path_factory):
    "From an LN teacher's exported program to a folder."
    base = tmp_path_factory.mktemp("distill")
    demo_teacher(base/"mine.pt2", norm="ln", epochs=1)
    return base, papermill(repo, "distill", base/"out.ipynb", "-p", "teacher", base/"mine.pt2", "-p", "run", "mine", "-p", "test_data", "digits", *QUICK)


def test_the_whole_way_from_a_file_to_a_folder(run):
    base, done = run
    assert done.returncode == 0, done.stderr[-2000:]
    folder = base/"distilled/mine/student"
    assert {f.name for f in folder.iterdir()} == {"student.safetensors", "student.json", "student.pt2", "student.onnx", "README.md"}
    card = json.loads((folder/"student.json").read_text())
    assert card["ledger"]["data_free"] and card["state"] == "finished" and card["teacher"]["kind"] == "pt2"
    assert load_student(folder)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    text = (base/"out.ipynb").read_text()
    assert "GroupNorms" in text or "LayerNorms" in text
    assert "data free: True" in (folder/"README.md").read_text()


def test_a_budget_stops_and_goes_on(repo, run, tmp_path):
    base, _ = run
    args = ["-p", "teacher", base/"mine.pt2", "-p", "run", "parts", *QUICK]
    first = papermill(repo, "distill", tmp_path/"first.ipynb", *args, "-p", "budget_seconds", "0.001")
    assert first.returncode == 0 and "unfinished after" in (tmp_path/"first.ipynb").read_text(), first.stderr[-1500:]
    second = papermill(repo, "distill", tmp_path/"second.ipynb", *args)
    assert second.returncode == 0 and "finished after 4 steps" in (tmp_path/"second.ipynb").read_text(), second.stderr[-1500:]


@pytest.mark.parametrize("args, words", [
    (["-p", "teacher", "nowhere.pt2"], "there is no file nowhere.pt2"),
    (["-p", "teacher", "weights.safetensors"], "holds weights only"),
    (["-p", "teacher", "weights.safetensors", "-p", "architecture", "wrn61"], "did you mean 'wrn16'"),
    (["-p", "input_shape", "3,32"], "input_shape must be channels,height,width"),
    (["-p", "run", "a/b"], "without slashes"),
    (["-p", "techer", "x"], "did you mean 'teacher'"),
])
def test_what_is_wrong_is_said_in_one_sentence(repo, tmp_path, args, words):
    save_tensors(tmp_path/"weights.safetensors", create_model("wrn16", 10, 1, 8, width=1, seed=0).state_dict())
    done = papermill(repo, "distill", tmp_path/"out.ipynb", *args, outputs=tmp_path/"results")
    assert done.returncode != 0 and words in done.stderr, done.stderr[-1500:]
    assert any("ValueError: " in line and words in line for line in done.stderr.splitlines())
    assert not (tmp_path/"results").exists()
