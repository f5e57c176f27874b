"""Several processes against one: the same numbers, and an end with a name when one of them dies.

Loading PyTorch takes seconds, so this file is also a program: it loads it once, forks the processes of every job, and
writes what they found into a folder, where the tests look.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from nskd.engine.checkpoints import Checkpoints
from nskd.distillation import Distillation, DistillConfig, distill
from faults import finish, start
from nskd.norms import align_batch
from nskd.engine.shared_batch import current, over_processes, processes, sum_gradients
from nskd.practice.torchrun import main
from nskd.engine.files import load_tensors
from nskd.engine.keys import tensors_key

ROOT = Path(__file__).resolve().parents[1]
# 26 rows: 6 and 7 for four processes. Adam turns rounding into steps of size lr where a gradient is zero, hence the
# small one.
CFG = DistillConfig(steps=3, batch_size=26, k=3, eval_every=2, lr=1e-5, device="cpu", precision="fp32")
CASES = {
    "bn": CFG,
    "aligned": CFG.replace(alpha=0.7),
    "pool, mixup": CFG.replace(pool_size=70, mixup=True),
    "reuse, joint": CFG.replace(requery=False, joint_pool=True),
    "cached targets": CFG.replace(pool_size=70, target_contexts=2),
    "perlin": CFG.replace(sampler="perlin", k=1, teacher_mode="rs"),
}
LONG = CFG.replace(steps=8, checkpoint_every=2, eval_every=3, lr=1e-3)


# ---- the program


def norm(kind, c):
    return nn.BatchNorm2d(c) if kind == "bn" else nn.GroupNorm(1 if kind == "ln" else 4, c)


def net(seed, kind="bn", act=nn.GELU):
    "Smooth, unless asked: where an activation is within rounding of zero, ReLU's gradient may jump."
    torch.manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        norm(kind, 16),
        act(),
        nn.Dropout2d(0.2),
        nn.Conv2d(16, 16, 3, stride=2),
        norm(kind, 16),
        act(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(144, 32),
        nn.BatchNorm1d(32),
        act(),
        nn.Linear(32, 5),
    )
    made.input_shape = (1, 8, 8)
    return made


def nets(case):
    return (net(0, "ln"), align_batch(net(1, "gn"), 0.5)) if case == "aligned" else (net(0), net(1))


def data():
    g = torch.Generator().manual_seed(0)
    return torch.rand(40, 1, 8, 8, generator=g), torch.randint(5, (40,), generator=g)


def watched(case):
    "A run of `case`: what every step saw, and the student after it."
    seen, (forward, add) = [], (Distillation.forward, sum_gradients)

    def listen(job):
        found = forward(job)
        seen.append(
            {
                "inputs": found[0].clone(),
                "teacher": found[1].clone(),
                "student": found[2].detach().clone(),
                "loss": found[3].detach().clone(),
            }
        )
        return found

    def listen_too(parameters):
        parameters = list(parameters)
        add(parameters)
        seen[-1]["gradients"] = torch.cat([p.grad.flatten() for p in parameters])

    Distillation.forward, distill.__globals__["sum_gradients"] = listen, listen_too
    try:
        result = distill(*nets(case), CASES[case], test_data=data(), progress=False)
    finally:
        Distillation.forward, distill.__globals__["sum_gradients"] = forward, add
    buffers = {n: b for n, b in result.student.named_buffers()}
    return {
        "steps": seen,
        "buffers": buffers,
        "key": tensors_key(result.student.state_dict()),
        "history": result.history.drop(columns="seconds", errors="ignore").to_dict("list"),
        "table": result.history.drop(columns="seconds", errors="ignore").to_csv(),
    }


def coupled():
    "Gradients of a loss that normalises logits over the batch, as LumiNet does; ReLU, in float64."
    x = torch.randn(26, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    student = net(3, act=nn.ReLU).double().train()
    torch.manual_seed(7)
    z = over_processes(student, x)
    loss = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()).pow(3)[:, :2].mean()
    loss.backward()
    sum_gradients(student.parameters())
    return {"loss": loss.detach(), "gradients": torch.cat([p.grad.flatten() for p in student.parameters()])}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def job(n, work, folder):
    """Fork `n` processes that do `work(rank)` together.

    Their exit codes. What they print goes to `folder`/rank.txt, what they return to rank.pt.
    """
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)

    def one(rank):
        os.dup2(os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY), 2)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with processes():
            found = work(rank)
        torch.save(found, folder / f"{rank}.pt")

    codes = [finish(pid) for pid in [start(lambda r=r: one(r)) for r in range(n)]]
    (folder / "job.json").write_text(json.dumps({"codes": codes}))


def long(run, harm=None, cfg=LONG):
    "A run of eight steps with `harm(rank, step)` before each."
    step = Distillation.take_step

    def harmed(job):
        if harm:
            harm(current().rank, job.step)
        step(job)

    Distillation.take_step = harmed
    try:
        result = distill(net(0), net(1), cfg, run, data(), progress=False)
    finally:
        Distillation.take_step = step
    return {
        "state": result.state,
        "step": result.step,
        "key": tensors_key(result.student.state_dict()),
        "history": result.history.drop(columns="seconds", errors="ignore").to_dict("list"),
    }


def killed(rank, step):
    if (rank, step) == (1, 5):
        os.kill(os.getpid(), signal.SIGKILL)


def first_killed(rank, step):
    if (rank, step) == (0, 5):
        os.kill(os.getpid(), signal.SIGKILL)


def failing(rank, step):
    if (rank, step) == (1, 5):
        raise RuntimeError("a test of failure")


def refusals(rank):
    "What is wrong in all processes, or in one, is said in all."
    said = []
    file = Path(os.environ["A_FILE"])
    for teacher, student, cfg, run in (
        (net(0), net(1 + (rank == 1)), CFG, None),
        (net(0), net(1), CFG.replace(batch_size=3), None),
        (net(0), net(1), CFG, file),
        (net(0), net(1), CFG, f"{file}{rank}"),
    ):
        try:
            distill(teacher, student, cfg, run, progress=False)
            said.append("nothing")
        except ValueError as e:
            said.append(str(e))
    return said


def program(folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def everything(rank):
        return {"coupled": coupled()} | {case: watched(case) for case in CASES}

    torch.save(everything(0), folder / "alone.pt")
    for n in (2, 4):
        job(n, everything, folder / f"same{n}")
    runs = folder / "runs"
    job(2, lambda r: long(runs / "whole"), folder / "whole")
    for n, harm, name in (
        (2, killed, "killed2"),
        (4, killed, "killed4"),
        (2, first_killed, "first"),
        (2, failing, "failing"),
    ):
        job(n, lambda r: long(runs / name, harm), folder / name)
        (folder / name / "left.json").write_text(
            json.dumps(
                {
                    "steps": Checkpoints(runs / name).steps(),
                    "files": sorted(p.name for p in runs.joinpath(name).iterdir()),
                }
            )
        )
    for n in (1, 4):
        shutil.copytree(runs / "killed2", runs / f"by{n}")
    job(2, lambda r: long(runs / "killed2"), folder / "on2")
    job(4, lambda r: long(runs / "by4"), folder / "on4")
    torch.save(long(runs / "by1"), folder / "on1.pt")
    torch.save(long(None), folder / "long.pt")
    job(
        2,
        lambda r: [
            long(runs / "budget", cfg=LONG.replace(budget_seconds=b))
            for b in ([1e-9, 1e9][r], [1e-9, 1e9][r], None, None)
        ],
        folder / "budget",
    )
    (folder / "a file").write_text("")
    os.environ["A_FILE"] = str(folder / "a file")
    job(4, refusals, folder / "refusals")


if __name__ == "__main__":
    program(Path(sys.argv[1]))
    sys.exit()


# ---- the tests


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder


def load(path):
    return torch.load(path, weights_only=False)


def told(folder):
    return json.loads((folder / "job.json").read_text())


def words(folder):
    return {int(p.stem): p.read_text() for p in folder.glob("*.txt")}


@pytest.fixture(scope="module")
def same(found):
    "{number of processes: what each of them found}"
    for n in (2, 4):
        assert told(found / f"same{n}")["codes"] == [0] * n, words(found / f"same{n}")
    return {1: [load(found / "alone.pt")]} | {
        n: [load(found / f"same{n}" / f"{r}.pt") for r in range(n)] for n in (2, 4)
    }


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_processes_compute_what_one_computes(same, case, n):
    alone, shared = same[1][0][case], same[n][0][case]
    assert len(alone["steps"]) == len(shared["steps"]) == CFG.steps
    for one, many in zip(alone["steps"], shared["steps"]):
        assert torch.equal(one["inputs"], many["inputs"])  # noise, and which of it is kept: bit for bit
        for what in ("teacher", "student", "loss", "gradients"):
            torch.testing.assert_close(many[what], one[what], atol=1e-5, rtol=1e-5, msg=lambda m: f"{what}: {m}")
    for name, b in alone["buffers"].items():
        torch.testing.assert_close(shared["buffers"][name], b, atol=1e-5, rtol=1e-5)
    for column, values in alone["history"].items():
        if not column.startswith("accuracy"):
            assert shared["history"][column] == pytest.approx(values, rel=1e-5, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("n", [2, 4])
def test_all_processes_end_with_the_same_bits(same, n):
    for case in CASES:
        assert (
            len({found[case]["key"] for found in same[n]}) == 1
            and len({found[case]["table"] for found in same[n]}) == 1
        )
        for step in range(CFG.steps):
            assert all(
                torch.equal(f[case]["steps"][step][k], same[n][0][case]["steps"][step][k])
                for f in same[n]
                for k in ("student", "loss", "gradients")
            )


def test_a_share_of_its_own_would_be_another_thing(same):
    "The comparison can fail: a process that normalised its own rows would differ by far more."
    step = same[1][0]["bn"]["steps"][0]
    student = net(1).train()
    torch.manual_seed(0)
    with torch.no_grad():
        own = student(step["inputs"][:13])
    assert (own - step["student"][:13]).abs().max() > 0.05


@pytest.mark.parametrize("n", [2, 4])
def test_a_loss_that_couples_the_batch_needs_nothing_more(same, n):
    for what, one in same[1][0]["coupled"].items():
        torch.testing.assert_close(same[n][0]["coupled"][what], one, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name, lost", [("killed2", 1), ("killed4", 1), ("first", 0)])
def test_a_killed_process_ends_the_job_and_the_checkpoint_stays(found, name, lost):
    codes = told(found / name)["codes"]
    assert codes[lost] == -signal.SIGKILL and all(
        c not in (0, -signal.SIGKILL) for r, c in enumerate(codes) if r != lost
    )
    left = json.loads((found / name / "left.json").read_text())
    assert left["steps"] == [2, 4] and "result.json" not in left["files"]


def test_a_failing_process_ends_the_job_with_its_own_words(found):
    assert told(found / "failing")["codes"] == [3, 3]
    assert "RuntimeError: a test of failure" in words(found / "failing")[1]


def test_torchrun_names_a_killed_process(tmp_path):
    (tmp_path / "die.py").write_text(
        "import os, signal, torch\nfrom nskd.engine.shared_batch import processes\nwith processes() as group:\n"
        "    if group.rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n    group.sum(torch.zeros(1))\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local_addr=127.0.0.1",
            "--nproc_per_node=2",
            tmp_path / "die.py",
        ],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and re.search(r"rank *: 1 .*", done.stderr) and "SIGKILL" in done.stderr


def test_what_was_killed_goes_on_with_any_number_of_processes(found):
    for name in ("whole", "on2", "on4"):
        assert set(told(found / name)["codes"]) == {0}, words(found / name)
    whole, on2, on4 = (load(found / name / "1.pt") for name in ("whole", "on2", "on4"))
    on1, alone = load(found / "on1.pt"), load(found / "long.pt")
    assert on2 == whole == load(found / "whole/0.pt")  # the same number: the same bits
    for other in (on4, on1, alone):
        assert other["state"] == "finished" and other["history"]["loss"] == pytest.approx(
            whole["history"]["loss"], rel=1e-3
        )
        assert other["history"]["images_seen"] == whole["history"]["images_seen"]
    runs = found / "runs"
    assert (
        not (runs / "killed2/checkpoints").exists()
        and tensors_key(load_tensors(runs / "killed2/student.safetensors")) == whole["key"]
    )
    assert json.loads((runs / "killed2/result.json").read_text())["provenance"]["processes"] == 2


def test_the_first_process_decides_about_time(found):
    assert told(found / "budget")["codes"] == [0, 0], words(found / "budget")
    for results in (load(found / "budget/0.pt"), load(found / "budget/1.pt")):
        assert [(r["state"], r["step"]) for r in results] == [
            ("unfinished", 1),
            ("unfinished", 2),
            ("finished", 8),
            ("finished", 8),
        ]
        assert results[2] == results[3] and results[2]["key"] == load(found / "whole/0.pt")["key"]


def test_what_one_process_has_other_than_the_first_is_refused_by_all(found):
    assert told(found / "refusals")["codes"] == [0] * 4, words(found / "refusals")
    said = [load(found / "refusals" / f"{r}.pt") for r in range(4)]
    assert all(s == said[0] for s in said) and all("\n" not in s for s in said[0])
    for text, expected in zip(
        said[0],
        (
            "process 1 has another student than process 0",
            "a batch of 3 can't be shared by 4 processes",
            "is a file",
            "another run_dir",
        ),
    ):
        assert expected in text


def test_torchrun_distils_with_the_parameters_of_the_notebook(tmp_path):
    "Two processes from the command line; stopped by its budget, and given again."
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "NSKD_OUTPUTS": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }

    def command(n, *more):
        launch = (
            ["-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", f"--nproc_per_node={n}"]
            if n > 1
            else []
        )
        return subprocess.run(
            [sys.executable, *launch, "-m", "nskd.practice.torchrun", "params/smoke/distill.yaml", "run=try", *more],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )

    done = command(2, "budget_seconds=1.0e-9")
    assert done.returncode == 0 and re.search(
        r"unfinished after 1 of 4 steps.*\ngive the same command again", done.stdout
    ), done.stderr
    done = command(2)
    assert (
        done.returncode == 0
        and "finished after 4 of 4 steps" in done.stdout
        and "papermill nbs/distill.ipynb" in done.stdout
    ), done.stderr
    assert json.loads((tmp_path / "distilled/try/run/result.json").read_text())["provenance"]["processes"] == 2


def test_the_command_refuses_in_a_sentence(tmp_path, capsys):
    (tmp_path / "list.yaml").write_text("[1]")
    smoke = str(ROOT / "params/smoke/distill.yaml")
    for given, said in (
        ([str(tmp_path / "nothing.yaml")], "can't be read as YAML"),
        ([str(tmp_path / "list.yaml")], "NAME: VALUE"),
        ([smoke, "stps=3"], "did you mean 'steps'"),
        ([smoke, "steps"], "NAME=VALUE"),
        ([smoke, "teacher=/nowhere.pt2"], "/nowhere.pt2"),
    ):
        assert main(given) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and said in err, err
    with pytest.raises(SystemExit) as e:
        main(["--help"])
    assert e.value.code == 0 and "torchrun --nproc_per_node" in capsys.readouterr().out
