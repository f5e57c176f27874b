"""The digits recipe does what the tables rely on."""

import pytest
import torch

from nskd.data import load_dataset
from nskd.engine.keys import tensors_key
from nskd.teachers import TeacherRecipe, train_teacher


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("NSKD_OUTPUTS", str(tmp_path))


@pytest.mark.parametrize("norm, least", [("bn", 97), ("ln", 95)])
def test_wrn28_reaches_its_accuracy_on_digits(norm, least):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the grid runs it
    try:
        net = train_teacher("wrn28", load_dataset("digits"), norm=norm, width=1, seed=0, progress=False)
    finally:
        torch.set_num_threads(threads)
    assert net.record["accuracy"]["rs"] >= least


def test_same_seed_same_bits_and_another_seed_others():
    ds, recipe = load_dataset("digits"), TeacherRecipe(epochs=1)

    def train(seed, **kw):
        return train_teacher("wrn16", ds, width=1, seed=seed, recipe=recipe.replace(**kw), progress=False)

    first = train(0).record
    again = train(0)
    assert again.record["cached"] and tensors_key(again.state_dict()) == first["key"]
    assert train(1).record["key"] != first["key"] != train(0, lr=0.05).record["key"]


def test_a_diverging_teacher_says_at_which_step():
    with pytest.raises(FloatingPointError, match="step [0-9]+: lower the recipe's lr"):
        train_teacher(
            "wrn16", load_dataset("digits"), width=1, recipe=TeacherRecipe(epochs=2, lr=1e30, clip=1e30), progress=False
        )


def test_a_teacher_that_a_grid_trained_is_found_from_a_notebook_with_more_threads(monkeypatch):
    "Only tiny images pin the thread count, which is part of what a teacher is."
    import nskd.teachers
    from nskd.experiments.runner import train_teachers, trained_teacher
    from nskd.experiments.cells import TeacherCell

    monkeypatch.setattr(nskd.teachers, "below_24px", lambda shape: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cell = TeacherCell(teacher="wrn16", norm="bn", seed=0, dataset="digits", teacher_width=1, teacher_epochs=1)
        assert trained_teacher(cell) is None
        (net,) = train_teachers([cell], workers=1)
        assert net is not None and net.record["cached"] and torch.get_num_threads() == 2
        with monkeypatch.context() as m:  # and a grid that finds it starts no process
            m.setattr("nskd.engine.workers.run_parallel", None)
            assert train_teachers([cell], workers=2)[0].record["key"] == net.record["key"]
    finally:
        torch.set_num_threads(threads)
