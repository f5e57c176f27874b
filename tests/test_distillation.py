"""What distil promises beside its result: an untouched teacher, flat memory, determinism, and errors that name the
step.
"""

import weakref

import pandas as pd
import pytest
import torch

from nskd.data import load_dataset
from nskd.distillation import Distillation, DistillConfig, distill, ledger_of, resolve
from nskd.engine.checkpoints import Checkpoints
from nskd.engine.files import read_json, write_json
from nskd.evaluation import evaluate_modes
from nskd.supervision import TeacherBatches
from nskd.experiments.runner import run_cells
from nskd.models import create_model
from nskd.norms import norm_kinds, teacher_context
from nskd.engine.keys import tensors_key
from nskd.samplers import Sampler, create_sampler
from nskd.tables.methods import TableParameters, table_cells

DATA = (torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 10)
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
        watched = Sampler("watched", (1, 8, 8), draw)
        batches = TeacherBatches(teacher(), watched, DistillConfig(k=k, batch_size=16), 10, torch.device("cpu"))
        x, _, tally = batches(torch.Generator().manual_seed(0))
    assert len(x) == 16 and tally.counts["pool"].sum() == 16 * k
    assert most[0] <= 2


def test_a_run_is_a_function_of_its_seed():
    def run(seed):
        return distill(teacher(), student(), SHORT.replace(seed=seed), progress=False)

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

    def run(**kw):
        return distill(
            **{
                **dict(
                    teacher=teacher(),
                    student=student(),
                    cfg=SHORT,
                    run_dir=tmp_path / "r",
                    test_data=data,
                    progress=False,
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
take = d.Distillation.take_step
def step(job):
    if job.step == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)
    take(job)
d.Distillation.take_step = step
cfg = SHORT.replace(steps=8, checkpoint_every=1, **json.loads(sys.argv[3]))
distill(teacher(), student(), cfg, sys.argv[1], progress=False)
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
            pairs = [pair for step in range(3) for pair in zip(*s(torch.Generator().manual_seed(step))[:2])]
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


def weights(result):
    return tensors_key(result.student.state_dict())


def same_run(a, b):
    "Whether two results have the same bits, and the same history but for the time that it took."
    pd.testing.assert_frame_equal(a.history.drop(columns="seconds"), b.history.drop(columns="seconds"))
    return weights(a) == weights(b)


@pytest.mark.parametrize(
    "options",
    [
        dict(average=0.7, warmup=0.5, schedule="linear"),
        dict(average=0.5, optimiser="adamw"),
        dict(pool_size=64),
        dict(pool_size=64, target_contexts=3),
    ],
    ids=lambda options: ",".join(options),
)
def test_what_is_stopped_ends_with_the_same_bits(options, tmp_path):
    cfg = SHORT.replace(steps=8, checkpoint_every=3, **options)
    whole = distill(teacher(), student(), cfg, tmp_path / "whole", DATA, progress=False)
    net = student()
    for _ in range(5):
        part = distill(teacher(), net, cfg.replace(budget_seconds=1e-9), tmp_path / "part", DATA, progress=False)
    assert part.step == 5 and part.state == "unfinished"
    part = distill(teacher(), student(), cfg, tmp_path / "part", DATA, progress=False)
    assert same_run(part, whole) and part.history.images_seen.iloc[-1] == 8 * cfg.images
    assert evaluate_modes(part.student, *DATA)["cs"] == pytest.approx(part.accuracy["cs"])


def test_an_average_that_forgets_at_once_is_the_student_itself():
    plain, forgetful = (distill(teacher(), student(), SHORT.replace(average=a), progress=False) for a in (None, 1e-9))
    for a, b in zip(plain.student.state_dict().values(), forgetful.student.state_dict().values()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_stopped_notebook_goes_on_with_the_same_student(tmp_path, monkeypatch):
    cfg, net, step = SHORT.replace(steps=8, eval_every=3, checkpoint_every=2), student(), Distillation.take_step
    whole = distill(teacher(), student(), cfg, tmp_path / "whole", progress=False)
    for at, kept in ((1, []), (4, [2, 4]), (7, [4, 6])):

        def stop(job):
            if job.step == at:
                raise KeyboardInterrupt
            step(job)

        monkeypatch.setattr(Distillation, "take_step", stop)
        with pytest.raises(KeyboardInterrupt):
            distill(teacher(), net, cfg, tmp_path / "part", progress=False)
        assert Checkpoints(tmp_path / "part").steps() == kept
    monkeypatch.setattr(Distillation, "take_step", step)
    part = distill(teacher(), net, cfg, tmp_path / "part", progress=False)
    assert same_run(part, whole) and not (tmp_path / "part/checkpoints").exists()


def test_a_finished_student_that_changed_on_the_disk_is_made_again(tmp_path):
    whole = distill(teacher(), student(), SHORT, tmp_path, progress=False)
    key, file = weights(whole), tmp_path / "student.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged-student.safetensors"):
        again = distill(teacher(), student(), SHORT, tmp_path, progress=False)
    assert weights(again) == key


def test_a_run_from_before_an_option_existed_is_the_same_run(tmp_path):
    cfg = SHORT.replace(pool_size=64)
    distill(teacher(), student(), cfg, tmp_path, progress=False)
    left = read_json(tmp_path / "distill.json")
    write_json(tmp_path / "distill.json", {k: v for k, v in left.items() if k != "target_contexts"})
    distill(teacher(), student(), cfg, tmp_path, progress=False)
    with pytest.raises(ValueError, match="another target_contexts"):
        distill(teacher(), student(), cfg.replace(target_contexts=3), tmp_path, progress=False)


def test_every_loss_trains_and_they_differ():
    losses = {}
    for loss in ("kd", "pseudo_label", "luminet"):
        result = distill(teacher(), student(), SHORT.replace(loss=loss, schedule="cosine"), progress=False)
        losses[loss] = result.history.loss.iloc[-1]
        assert result.accuracy == {} and result.best["chosen_by"].endswith("no labels")
        assert result.history.lr.iloc[-1] < SHORT.lr
    assert len(set(losses.values())) == 3 and min(losses.values()) > 0


def test_what_is_settled_is_settled_once():
    net = create_model("wrn16", in_channels=1, image_size=8, norm="ln", width=1, seed=0)
    setup = resolve(net, student(), SHORT.replace(device="cpu", precision="fp32"))
    assert (setup.mode, setup.alpha, setup.num_classes, setup.shape) == ("aligned", 0.5, 10, (1, 8, 8))
    assert resolve(teacher(), student(), SHORT).alpha is None
    with pytest.raises(AttributeError):
        setup.mode = "cs"
    auto = resolve(net, student(), SHORT.replace(alpha="auto"))
    assert auto.alpha == resolve(net, student(), SHORT.replace(alpha="auto")).alpha
