"""Runs that die in every way and are started again: the same bits, and nothing lost."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

import nskd.engine.training
import nskd.teachers
from nskd.engine.checkpoints import Checkpoints
from nskd.data import load_dataset
from nskd.distillation import DistillConfig, distill
from nskd.experiments.runner import run_cells
from faults import FAULTS, fault_table
from nskd.engine.runs import Unfinished, cached, directory_lock
from nskd.engine.keys import tensors_key
from nskd.samplers import create_sampler
from nskd.tables.methods import TableParameters, table_cells
from nskd.teachers import TeacherRecipe, train_teacher

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")

KILLS = [f for f in FAULTS if f.startswith("SIG") or f.startswith("Keyboard")]


def python(repo, code, *args, **env):
    "Start `code` in a process that has the repository."
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{repo}:{repo / 'tests'}", "OMP_NUM_THREADS": "1", **env},
    )


def test_no_fault_loses_a_run_or_changes_a_bit():
    times = {f: 24 if f in KILLS else 6 for f in FAULTS}
    table = fault_table(times).set_index("fault")
    assert (table.injected >= pd.Series(times)).all(), table
    assert table.loc[KILLS].injected.sum() >= 100
    assert table.lost.sum() == table.different.sum() == 0, table


@pytest.mark.parametrize(
    "broken",
    [
        "lambda opt, tensors: None",  # an optimiser that is forgotten
        "lambda opt, tensors: _real(opt, {k: v for k, v in tensors.items() if not k.endswith('exp_avg_sq')})",
    ],
)
def test_the_comparison_can_fail(repo, broken):
    work = python(
        repo,
        f"""
        import nskd.distillation as d, faults as f
        _real = d.restore_optimiser
        d.restore_optimiser = {broken}
        found = f.inject("SIGKILL before a rename", 6)
        print(found["different"] + found["lost"])""",
    )
    out, err = work.communicate()
    assert work.returncode == 0 and int(out.splitlines()[-1]) > 0, err[-2000:]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_workers_end_with_a_killed_notebook(repo, tmp_path):
    (tmp_path / "work.py").write_text(
        "import os, time\ndef wait(folder): open(f'{folder}/{os.getpid()}.pid', 'w').close(); time.sleep(600)\n"
    )
    notebook = python(
        repo,
        "import sys; from work import wait; from nskd.engine.workers import run_parallel\n"
        "run_parallel(wait, [sys.argv[1]] * 2, 2)",
        tmp_path,
        PYTHONPATH=f"{repo}:{tmp_path}",
    )
    soon = time.monotonic() + 60
    while len(workers := [int(f.stem) for f in tmp_path.glob("*.pid")]) < 2 and time.monotonic() < soon:
        time.sleep(0.1)
    assert len(workers) == 2
    notebook.kill()
    notebook.communicate()

    def gone():
        return not any(Path(f"/proc/{pid}").exists() for pid in workers)

    while not gone() and time.monotonic() < soon:
        time.sleep(0.1)
    assert gone()


def test_a_dead_holder_of_a_lock_is_noticed(repo, tmp_path):
    "The second process waits for the first, and has the lock at once when the first is killed."
    hold = (
        "import sys, time; from nskd.engine.runs import directory_lock\n"
        "with directory_lock(sys.argv[1]): print('mine', flush=True); time.sleep(600)"
    )
    first = python(repo, hold, tmp_path)
    assert first.stdout.readline() == "mine\n"
    second = python(repo, hold, tmp_path)
    try:
        with pytest.raises(ValueError, match="another process is at work"):
            with directory_lock(tmp_path, wait=False):
                pass
        assert "waiting for it" in second.stderr.readline() and second.poll() is None
        os.kill(first.pid, signal.SIGKILL)
        assert second.stdout.readline() == "mine\n"
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_two_processes_make_a_cell_once(repo, tmp_path):
    work = """
        import json, sys, time
        from pathlib import Path
        from nskd.engine.runs import cached
        def make(directory):
            with open(sys.argv[1] + "/made", "a") as f: f.write("x")
            time.sleep(1)
            return {"answer": 42}
        print(json.dumps(cached("cell", {"seed": 0}, make)))"""
    both = [python(repo, work, tmp_path, NSKD_OUTPUTS=str(tmp_path)) for _ in range(2)]
    found = [json.loads(p.communicate()[0]) for p in both]
    assert [f["answer"] for f in found] == [42, 42] and sorted(f["cached"] for f in found) == [False, True]
    assert (tmp_path / "made").read_text() == "x"


def test_a_killed_cell_is_made_by_the_next(repo, tmp_path):
    work = """
        import os, signal
        from nskd.engine.runs import cached
        print(cached("cell", {"seed": 0}, lambda directory: os.kill(os.getpid(), signal.SIGKILL)))"""
    killed = python(repo, work, NSKD_OUTPUTS=str(tmp_path))
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    os.environ["NSKD_OUTPUTS"], before = str(tmp_path), os.environ.get("NSKD_OUTPUTS")
    try:
        assert cached("cell", {"seed": 0}, lambda directory: {"answer": 1})["cached"] is False
    finally:
        os.environ.pop("NSKD_OUTPUTS") if before is None else os.environ.__setitem__("NSKD_OUTPUTS", before)


class TestTeachers:
    recipe = TeacherRecipe(epochs=3, batch_size=256)

    @pytest.fixture(autouse=True)
    def outputs(self, tmp_path, monkeypatch):
        monkeypatch.setenv("NSKD_OUTPUTS", str(tmp_path / "own"))

    def train(self, recipe=None, **kw):
        return train_teacher(
            "wrn16", load_dataset("digits"), width=1, recipe=recipe or self.recipe, progress=False, **kw
        )

    @pytest.mark.parametrize(
        "recipe", [recipe, TeacherRecipe(epochs=2, batch_size=256, optimiser="adamw", lr=1e-3, flip=True)]
    )
    def test_interrupted_training_ends_with_the_same_bits(self, recipe, tmp_path, monkeypatch):
        "A checkpoint after every step, and death at every step in turn, in the middle of an epoch too."
        whole = self.train(recipe).record
        monkeypatch.setenv("NSKD_OUTPUTS", str(tmp_path / "parts"))
        monkeypatch.setattr(nskd.engine.training, "CHECKPOINT_SECONDS", 0)
        take, deaths = nskd.teachers.TeacherTraining.take_step, []

        def step(job, *batch):
            take(job, *batch)
            if job.step not in deaths and job.step % 2:
                deaths.append(job.step)
                raise KeyboardInterrupt

        monkeypatch.setattr(nskd.teachers.TeacherTraining, "take_step", step)
        for _ in range(100):
            try:
                found = self.train(recipe)
                break
            except KeyboardInterrupt:
                torch.rand(3)  # whatever the user does in between
        assert (
            len(deaths) == recipe.epochs * 5 // 2 + recipe.epochs * 5 % 2
            and found.record["key"] == whole["key"]
            and found.record["accuracy"] == whole["accuracy"]
        )
        assert not list((tmp_path / "parts").rglob("checkpoints"))

    def test_a_budget_gets_there_in_the_end(self, tmp_path, monkeypatch):
        whole = self.train().record
        monkeypatch.setenv("NSKD_OUTPUTS", str(tmp_path / "parts"))
        with pytest.raises(Unfinished, match="not trained"):
            self.train(budget_seconds=0)
        said = []
        for _ in range(100):
            try:
                found = self.train(budget_seconds=1e-9)
                break
            except Unfinished as e:
                said.append(str(e))
        assert (
            said == [f"the teacher is at step {n} of 15" for n in range(1, 15)] and found.record["key"] == whole["key"]
        )
        assert self.train(budget_seconds=0).record["cached"]

    def test_short_training_writes_no_checkpoint(self, monkeypatch):
        monkeypatch.setattr(Checkpoints, "save", lambda *a: pytest.fail("a training of seconds wrote a checkpoint"))
        self.train()

    @pytest.mark.parametrize("harm", ["flip", "truncate", "empty"])
    def test_damaged_weights_are_made_again(self, harm):
        record = self.train().record
        file = Path(record["directory"]) / "weights.safetensors"
        data = bytearray(file.read_bytes())
        if harm == "flip":
            data[-100] ^= 16
        file.write_bytes({"flip": data, "truncate": data[:-7], "empty": b""}[harm])
        with pytest.warns(
            UserWarning, match="weights.safetensors is damaged .* set aside as damaged-weights.safetensors"
        ):
            again = self.train()
        assert again.record["key"] == record["key"] == tensors_key(again.state_dict()) and not again.record["cached"]
        assert self.train().record["cached"]


def children(pid):
    "Process numbers of all processes below `pid`."
    found = [int(c) for t in Path(f"/proc/{pid}/task").glob("*/children") for c in t.read_text().split()]
    return found + [g for c in found for g in children(c)]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the kernel")
def test_a_notebook_whose_kernel_is_killed_goes_on(repo, tmp_path):
    """papermill's kernel dies with a student half trained.

    The same command ends with the numbers of a run that was left alone.
    """
    options = dict(
        students="wrn16",
        norms="bn",
        methods="normshift",
        steps=40,
        batch_size=32,
        k=2,
        eval_every=5,
        teacher_epochs=1,
        workers=1,
    )
    args = [a for k, v in options.items() for a in ("-p", k, str(v))]
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {
        "NSKD_OUTPUTS": str(tmp_path / "out"),
        "OMP_NUM_THREADS": "1",
    }

    def start():
        return subprocess.Popen(
            [sys.executable, "-m", "papermill", str(repo / "nbs/table2.ipynb"), str(tmp_path / "out.ipynb"), *args],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    first, end = start(), time.monotonic() + 120
    while (
        not (begun := list((tmp_path / "out").glob("distil/*/run/checkpoints/0*")))
        and time.monotonic() < end
        and first.poll() is None
    ):
        time.sleep(0.01)
    for pid in children(first.pid):
        os.kill(pid, signal.SIGKILL)
    err = first.communicate()[1]
    assert begun and first.returncode != 0 and "died" in err.lower(), err[-2000:]
    assert not list((tmp_path / "out").glob("distil/*/done.json"))
    again = start()
    err = again.communicate()[1]
    assert again.returncode == 0, err[-2000:]
    numbers = pd.read_csv(tmp_path / "out/table2-wrn28/records.csv")
    os.environ["NSKD_OUTPUTS"], before = str(tmp_path / "whole"), os.environ.get("NSKD_OUTPUTS")
    try:
        whole = run_cells(table_cells(TableParameters(**options)), 1)
    finally:
        os.environ.pop("NSKD_OUTPUTS") if before is None else os.environ.__setitem__("NSKD_OUTPUTS", before)

    def drop(frame):
        return frame.drop(columns=["seconds", "directory", "cached"]).dropna(axis=1, how="all")

    pd.testing.assert_frame_equal(drop(numbers), drop(whole.round(4)), check_dtype=False)
    weights = [
        Path(p) / "run/student.safetensors" for p in (tmp_path / "out" / numbers.directory[0], whole.directory[0])
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_random_states_of_a_gpu_survive(tmp_path, precision):
    """A student with dropout on a GPU.

    Stopped at every checkpoint and continued, with other random numbers drawn in between.
    """

    def make(seed):
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3),
            torch.nn.BatchNorm2d(8),
            torch.nn.Flatten(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(8 * 36, 10),
        )

    cfg = DistillConfig(steps=6, eval_every=3, batch_size=32, k=2, device="cuda", precision=precision)
    sampler = create_sampler("gaussian", (1, 8, 8))
    whole = distill(make(0), make(1), cfg, sampler=sampler, progress=False)
    student = make(1)
    while (
        part := distill(make(0), student, cfg.replace(budget_seconds=1e-9), tmp_path, sampler=sampler, progress=False)
    ).state == "unfinished":
        torch.rand(7, device="cuda")
    assert tensors_key(part.student.state_dict()) == tensors_key(whole.student.state_dict())
    assert part.history.drop(columns="seconds").equals(whole.history.drop(columns="seconds"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_teacher_on_a_gpu_is_continued_with_the_same_bits(tmp_path, monkeypatch):
    ds, found = load_dataset("digits"), []
    for name, budget in (("whole", None), ("parts", 1e-9)):
        monkeypatch.setenv("NSKD_OUTPUTS", str(tmp_path / name))
        for _ in range(100):
            try:
                found.append(
                    train_teacher(
                        "wrn16",
                        ds,
                        norm="bn",
                        width=1,
                        recipe=TeacherRecipe(epochs=1),
                        device="cuda",
                        progress=False,
                        budget_seconds=budget,
                    ).record["key"]
                )
                break
            except Unfinished:
                torch.rand(7, device="cuda")
    assert len(found) == 2 and found[0] == found[1]
