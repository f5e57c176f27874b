"""Convolutions by Winograd's algorithm inside `distill`: the same student, the same run after a stop, and nothing where it was not asked for."""
from functools import partial

import pytest
import torch

import nskd.distillation, nskd.winograd
from nskd.distillation import DistillConfig, distill, replay
from nskd.samplers import create_sampler
from nskd.winograd import WinogradConv2d, pick_winograd, winograd_pays

CFG = DistillConfig(steps=6, eval_every=3, checkpoint_every=2, batch_size=32, k=2, precision="fp32", winograd=True, device="cpu")
tiny = partial(distill, sampler=create_sampler("gaussian", (1, 32, 32)), progress=False)


def net(width, seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(1, width, 3, padding=1), torch.nn.BatchNorm2d(width), torch.nn.GELU(), torch.nn.Conv2d(width, width, 3, padding=1, bias=False), torch.nn.GELU(),
                               torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(4 * width, 10))


def test_the_same_student_up_to_rounding():
    teacher = net(8, 0)
    plain, quick = (tiny(teacher, net(4, 1), CFG.replace(winograd=w)) for w in (False, True))
    assert (plain.winograd, quick.winograd) == (0, 4) and quick.summary()["winograd"] == 4
    assert quick.history.loss.tolist() == pytest.approx(plain.history.loss.tolist(), rel=1e-4)
    # Adam divides a gradient by its own size: where that is rounding, one step apart is as far as it gets
    assert all(torch.allclose(a, b, atol=1e-2) for a, b in zip(plain.student.state_dict().values(), quick.student.state_dict().values()))
    assert not any(isinstance(m, WinogradConv2d) for n in (teacher, quick.student) for m in n.modules())


def test_a_run_that_is_stopped_ends_with_the_same_bits(tmp_path, monkeypatch):
    whole = tiny(net(8, 0), net(4, 1), CFG, tmp_path / "whole")
    monkeypatch.setattr(nskd.distillation, "pick_winograd", lambda net, *a: pick_winograd(net, *a)[-1:])
    student = net(4, 1)
    for state in ("unfinished", "unfinished", "finished"):
        found = tiny(net(8, 0), student, CFG.replace(budget_seconds=None if state == "finished" else 1e-9), tmp_path / "run")
        assert found.state == state
        monkeypatch.setattr(nskd.distillation, "pick_winograd", lambda *a: pytest.fail("decided again"))
    assert found.winograd == 2 and tiny(net(8, 0), net(4, 1), CFG, tmp_path / "run").winograd == 2           # of its own four; finished: read from its record
    monkeypatch.setattr(nskd.distillation, "pick_winograd", pick_winograd)
    stopped = net(4, 1)
    tiny(net(8, 0), stopped, CFG.replace(budget_seconds=1e-9), tmp_path / "again")
    again = tiny(net(8, 0), stopped, CFG, tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(whole.student.state_dict().values(), again.student.state_dict().values()))


def test_a_replayed_step_is_the_one_that_was_taken(tmp_path):
    stopped = net(4, 1)
    tiny(net(8, 0), stopped, CFG.replace(budget_seconds=1e-9), tmp_path)
    step = replay(tmp_path, 3, net(8, 0), net(4, 1), create_sampler("gaussian", (1, 32, 32)))
    whole = tiny(net(8, 0), net(4, 1), CFG.replace(steps=4, eval_every=1))
    assert step.loss == pytest.approx(whole.history.loss.tolist()[3], rel=1e-6)


def test_another_setting_is_another_run(tmp_path):
    tiny(net(8, 0), net(4, 1), CFG.replace(budget_seconds=1e-9), tmp_path)
    with pytest.raises(ValueError, match="another winograd"): tiny(net(8, 0), net(4, 1), CFG.replace(winograd=False), tmp_path)


def test_by_default_layers_are_tried_once_and_never_for_small_images_or_few_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("NSKD_CACHE", str(tmp_path))
    tried = []
    monkeypatch.setattr(nskd.winograd, "_try", lambda *kind: (tried.append(kind), 2.0 if kind[0] == 8 else 0.5)[1])
    assert tiny(net(8, 0), net(4, 1), CFG.replace(winograd="auto")).winograd == 0 and not tried           # too short a run for a trial
    monkeypatch.setattr(nskd.distillation, "_WORTH_A_TRIAL", CFG.steps)
    found = tiny(net(8, 0), net(4, 1), CFG.replace(winograd="auto"))
    # teacher and student, first and second layer; by width
    assert found.winograd == 1 and sorted(k[:2] + k[5:6] for k in tried) == [(1, 4, True), (1, 8, False), (4, 4, True), (8, 8, False)]
    tiny(net(8, 0), net(4, 1), CFG.replace(winograd="auto"))
    assert len(tried) == 4
    monkeypatch.setattr(nskd.distillation, "pick_winograd", lambda *a: pytest.fail("tried"))
    assert distill(net(8, 0), net(4, 1), CFG.replace(winograd="auto", steps=1), sampler=create_sampler("gaussian", (1, 8, 8)), progress=False).winograd == 0


def test_a_trial_says_how_many_times_as_fast(tmp_path, monkeypatch):
    monkeypatch.setenv("NSKD_CACHE", str(tmp_path))
    assert winograd_pays(4, 4, 8, 8, 4, True) > 0 < winograd_pays(4, 4, 8, 8, 4, False, torch.bfloat16)


def test_what_cannot_be_is_refused_in_a_sentence(monkeypatch):
    with pytest.raises(ValueError, match="only one of them can be True"): DistillConfig(compile=True, winograd=True)
    monkeypatch.setattr(nskd.distillation, "pick_device", lambda device: torch.device("cuda"))
    with pytest.raises(ValueError, match="winograd is for a CPU"): tiny(net(8, 0), net(4, 1), CFG)
