"""What distil promises beside its result: an untouched teacher, flat memory, determinism, and errors that name the step."""

import weakref

import pandas as pd
import pytest
import torch

from nskd.data import load_dataset
from nskd.distillation import DistillConfig, distill, ledger_of
from nskd.supervision import TeacherBatches
from nskd.experiments.runner import run_cells
from nskd.models import create_model
from nskd.norms import norm_kinds, teacher_context
from nskd.engine.keys import tensors_key
from nskd.samplers import Sampler, create_sampler
from nskd.tables.methods import TableParameters, table_cells

SHORT = DistillConfig(steps=4, eval_every=2, batch_size=32, k=2)


def teacher(norm="bn", seed=0):
    return create_model("wrn16", in_channels=1, image_size=8, norm=norm, width=1, seed=seed)


def student(seed=1, **kw):
    return create_model("wrn16", in_channels=1, image_size=8, width=1, seed=seed, **kw)


@pytest.mark.parametrize("norm", ["bn", "ln", "gn"])
@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_stays_as_it_was(norm, training):
    net = teacher(norm).train(training)
    x, before = torch.randn(8, 1, 8, 8), {k: v.clone() for k, v in net.state_dict().items()}
    with teacher_context(net), torch.no_grad():
        answers = net(x)
    distill(net, student(), SHORT, progress=False)
    assert net.training == training and norm_kinds(net)["aligned"] == 0
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    with teacher_context(net), torch.no_grad():
        assert torch.equal(net(x), answers)


@pytest.mark.parametrize("k", [2, 12])
def test_noise_in_memory_does_not_grow_with_k(k):
    alive, most, noise = weakref.WeakSet(), [0], create_sampler("gaussian", (1, 8, 8))

    def draw(size, **kw):
        x = noise.sample(size, **kw)
        alive.add(x)
        most[0] = max(most[0], len(alive))
        return x

    with teacher_context(teacher(), "cs"):
        supervise = TeacherBatches(
            teacher(), Sampler("watched", (1, 8, 8), draw), DistillConfig(k=k, batch_size=16), 10, torch.device("cpu")
        )
        x, _ = supervise(torch.Generator().manual_seed(0))
    assert len(x) == 16 and supervise.tally["pool"].sum() == 16 * k
    assert most[0] <= 2


def test_a_run_is_a_function_of_its_seed():
    run = lambda seed: distill(teacher(), student(), SHORT.replace(seed=seed), progress=False)
    first, again, other = run(0), run(0), run(1)
    assert (
        tensors_key(first.student.state_dict())
        == tensors_key(again.student.state_dict())
        != tensors_key(other.student.state_dict())
    )
    pd.testing.assert_frame_equal(first.history.drop(columns="seconds"), again.history.drop(columns="seconds"))


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    distill(teacher(), student(), SHORT, progress=False)
    assert torch.equal(torch.randn(3), expected)


def test_a_student_that_explodes_is_stopped_at_its_step_and_the_checkpoint_stays(tmp_path):
    cfg = SHORT.replace(steps=50, eval_every=50, checkpoint_every=1, lr=1e18)
    with pytest.raises(FloatingPointError, match=r"^step \d+: the student's (logits|weights) are not finite") as e:
        distill(teacher(), student(), cfg, tmp_path, progress=False)
    assert (tmp_path / "checkpoints").is_dir() and not (tmp_path / "result.json").exists()
    with pytest.raises(FloatingPointError) as again:  # resumed, it fails at the same step
        distill(teacher(), student(), cfg, tmp_path, progress=False)
    assert str(again.value).split(":")[0] == str(e.value).split(":")[0]


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    cases = [
        dict(student=student(num_classes=7)),
        dict(cfg=SHORT.replace(teacher_mode="aligned")),
        dict(cfg=SHORT.replace(sampler="ddg")),
        dict(sampler=create_sampler("gaussian", (3, 8, 8))),
        dict(cfg=SHORT.replace(schedule="plateau_on_test_accuracy")),
        dict(test_data=(torch.zeros(3, 1, 8, 8), torch.zeros(2, dtype=torch.long))),
    ]
    for case in cases:
        with pytest.raises(ValueError) as e:
            distill(
                **{
                    **dict(teacher=teacher(), student=student(), cfg=SHORT, run_dir=tmp_path / "run", progress=False),
                    **case,
                }
            )
        assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


def test_a_small_batch_is_allowed_and_said():
    with pytest.warns(UserWarning, match="can't hold all 10 classes"):
        distill(teacher(), student(), SHORT.replace(batch_size=4, steps=1), progress=False)


def test_a_schedule_that_looks_at_labels_says_so():
    data = load_dataset("digits")
    cfg = SHORT.replace(schedule="plateau_on_test_accuracy", plateau_patience=0, plateau_factor=0.5)
    result = distill(teacher(), student(), cfg, test_data=(data.test_images, data.test_labels), progress=False)
    assert (
        not result.ledger["data_free"]
        and "labels" in result.ledger["schedule"]
        and "labelled" in result.best["chosen_by"]
    )
    assert ledger_of(SHORT)["data_free"]


def test_plateau_follows_the_distillation_loss():
    cfg = SHORT.replace(steps=14, eval_every=1, plateau_patience=0, plateau_factor=0.5)
    history = distill(teacher(), student(), cfg, progress=False).history
    best, lr = float("inf"), cfg.lr
    for row in history.itertuples():
        assert row.lr == pytest.approx(lr)
        if row.loss >= best * (1 - 1e-4):
            lr *= 0.5
        else:
            best = row.loss
    assert history.lr.iloc[-1] < cfg.lr


def test_workers_do_not_change_results(tmp_path, monkeypatch):
    p = TableParameters(
        students="wrn16",
        norms="bn",
        methods="gaussian_cs,normshift",
        steps=3,
        batch_size=16,
        k=2,
        eval_every=3,
        teacher_epochs=1,
    )
    found = []
    for workers in (1, 2):
        monkeypatch.setenv("NSKD_OUTPUTS", str(tmp_path / str(workers)))
        found.append(run_cells(table_cells(p), workers).drop(columns=["seconds", "directory", "cached"]))
    pd.testing.assert_frame_equal(*found, check_exact=True)


@pytest.mark.parametrize("loss", ["kd", "pseudo_label"])
def test_a_nan_teacher_is_named_whatever_the_loss(loss):
    broken = teacher()
    broken.fc.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 0: the teacher's logits are not finite"):
        distill(broken, student(), SHORT.replace(loss=loss), progress=False)


def test_a_run_directory_knows_what_its_numbers_depend_on(tmp_path):
    ds = load_dataset("digits")
    data = (ds.test_images[:100], ds.test_labels[:100])
    run = lambda **kw: distill(
        **{
            **dict(
                teacher=teacher(), student=student(), cfg=SHORT, run_dir=tmp_path / "r", test_data=data, progress=False
            ),
            **kw,
        }
    )
    done = run()
    assert run().accuracy == done.accuracy  # a finished run comes back
    assert run(cfg=SHORT.replace(alpha=0.1)).accuracy == done.accuracy  # alpha has no part with a BN teacher
    for kw, what in (
        (dict(test_data=None), "test_data"),
        (dict(student=student(5)), "student"),
        (dict(teacher=teacher(seed=3)), "teacher"),
        (dict(cfg=SHORT.replace(tau=2)), "tau"),
        (dict(sampler=create_sampler("ddg", (1, 8, 8), [0.3], [0.4])), "noise"),
    ):
        with pytest.raises(ValueError, match=f"another {what} "):
            run(**kw)


def test_a_budget_in_a_loop_gets_there_with_the_same_student(tmp_path):
    cfg, net, states = SHORT.replace(budget_seconds=1e-9), student(), []
    while not states or states[-1] == "unfinished":
        result = distill(teacher(), net, cfg, tmp_path, progress=False)
        states.append(result.state)
    assert states == ["unfinished"] * 3 + ["finished"]
    assert tensors_key(net.state_dict()) == tensors_key(
        distill(teacher(), student(), SHORT, progress=False).student.state_dict()
    )


KILLED = """
import json, os, signal, sys
from test_distillation import *
import nskd.distillation as d
take = d._Job.take_step
def step(job):
    if job.step == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)
    take(job)
d._Job.take_step = step
distill(teacher(), student(), SHORT.replace(steps=8, checkpoint_every=1, **json.loads(sys.argv[3])), sys.argv[1], progress=False)
"""


@pytest.mark.parametrize("options", [{}, dict(pool_size=48, target_contexts=3)])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, repo, options):
    import json
    import os
    import signal
    import subprocess
    import sys

    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(repo / "tests"), str(repo)])}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "5", json.dumps(options)], env=env)
    assert killed.returncode == -signal.SIGKILL and (tmp_path / "checkpoints").is_dir()
    cfg = SHORT.replace(steps=8, **options)
    resumed, whole = (
        distill(teacher(), student(), cfg, tmp_path, progress=False),
        distill(teacher(), student(), cfg, progress=False),
    )
    assert tensors_key(resumed.student.state_dict()) == tensors_key(whole.student.state_dict())
    pd.testing.assert_frame_equal(resumed.history.drop(columns="seconds"), whole.history.drop(columns="seconds"))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(target_contexts=4), "needs pool_size"),
        (dict(target_contexts=4, pool_size=64, mixup=True), "mixup must be False"),
    ],
)
def test_cached_targets_need_a_pool_that_stands_still(options, words):
    with pytest.raises(ValueError, match=words) as e:
        DistillConfig(**options)
    assert "\n" not in str(e.value)


def test_cached_targets_are_what_the_student_is_given():
    "Of an input the student always gets one answer, whatever its batch; asked anew, the teacher gives it several."

    def answers(**options):
        net = teacher()
        with teacher_context(net, "cs"):
            s = TeacherBatches(
                net,
                create_sampler("gaussian", (1, 8, 8)),
                DistillConfig(k=1, batch_size=32, pool_size=8, **options),
                10,
                torch.device("cpu"),
            )
            pairs = [pair for step in range(3) for pair in zip(*s(torch.Generator().manual_seed(step)))]
        return len({x.numpy().tobytes() for x, _ in pairs}), len({z.numpy().tobytes() for _, z in pairs})

    inputs, cached = answers(target_contexts=4)
    assert inputs == cached == 8 < answers()[1]


def test_bad_test_data_is_refused_before_the_run(tmp_path):
    x, y = torch.zeros(6, 1, 8, 8), torch.zeros(6, dtype=torch.long)
    for data, recal in (
        ((x[:, :, :4], y), None),
        ((x, y.float()), None),
        ((x, y - 1), None),
        ((x[:0], y[:0]), None),
        ((x, y), x[:, :, :4]),
    ):
        with pytest.raises(ValueError) as e:
            distill(teacher(), student(), SHORT, tmp_path / "run", test_data=data, recal_images=recal, progress=False)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()
