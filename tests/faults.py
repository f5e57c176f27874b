"""Everything that can kill a run, done to small runs on purpose.

A fault is injected from outside, by a signal, by damage to a file, or through the operating system's calls that every
write makes (`os.fsync`, `os.replace`); the library knows nothing of it.
"""

import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from nskd.engine.checkpoints import Checkpoints
from nskd.distillation import DistillConfig, distill

_SMOKE = DistillConfig(
    steps=8,
    batch_size=12,
    k=2,
    eval_every=3,
    checkpoint_every=1,
    plateau_patience=0,
    plateau_factor=0.5,
    device="cpu",
    precision="fp32",
)
RUNS = {
    "rejection sampling": _SMOKE,
    "pool and mixup": _SMOKE.replace(pool_size=24, mixup=True),
    "schedule on test accuracy": _SMOKE.replace(schedule="plateau_on_test_accuracy", lr=0.01),
    "cached targets": _SMOKE.replace(pool_size=24, target_contexts=2),
}


def _network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(128, 10),
        )
    net.input_shape = (1, 8, 8)
    return net


def smoke_run(name, directory):
    "Run (or go on with) the small run `name` of `RUNS` in `directory`; its `DistillResult`."
    g = torch.Generator().manual_seed(0)
    test = torch.rand(24, 1, 8, 8, generator=g), torch.randint(10, (24,), generator=g)
    return distill(_network(0), _network(1), RUNS[name], directory, test, progress=False)


def outcome(directory):
    "All that a finished run in `directory` must have in common with one that was never interrupted: bytes by name."
    directory, left = Path(directory), {}
    for f in ("student.safetensors", "best.safetensors", "ledger.json"):
        left[f] = (directory / f).read_bytes()
    left["files"] = json.dumps(
        sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file() and "damaged-" not in str(p))
    ).encode()
    left["history"] = pd.read_csv(directory / "history.csv").drop(columns="seconds").to_csv().encode()
    result = json.loads((directory / "result.json").read_text())
    left["result"] = json.dumps({k: result[k] for k in ("state", "accuracy", "steps")}).encode()
    return left


def start(work):
    """Fork a child that does `work()`.

    Its process number. The child exits with 0, 3 (an error, printed), or 130 (KeyboardInterrupt).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until the child can catch it
    if pid := os.fork():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        return pid
    code = 3
    try:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            torch.set_num_threads(1)
            work()
            code = 0
        except KeyboardInterrupt:
            code = 130
        except OSError as e:
            code = 28 if e.errno == errno.ENOSPC and "the disk is full" in str(e) else 3
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    finally:
        os._exit(code)  # interrupted on the way out


def finish(pid):
    "Wait for a child: its exit code, or minus the signal that killed it."
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


class AtWrite:
    """In place of a call of `os` that every write makes: `act(fd)` at the `n`-th, the real one before that."""

    def __init__(self, name, n, act):
        self.real, self.left, self.act = getattr(os, name), n, act
        setattr(os, name, self)

    def __call__(self, *args):
        self.left -= 1
        if self.left < 0:
            self.act(*args)
        return self.real(*args)


def _die_half_written(fd, *_):
    "A file of which the disk has half, and then the power goes."
    if stat.S_ISREG(os.fstat(fd).st_mode):
        os.ftruncate(fd, os.fstat(fd).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def _die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def _full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def _signalled(signum):
    def fault(run, directory, rng, seconds):
        pid = start(lambda: smoke_run(run, directory))
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signum)
        code = finish(pid)
        if code == 3:
            raise RuntimeError("the run failed by itself")
        return int(code != 0)

    return fault


def _at_write(name, act, n, code):
    "The process dies, or the disk fills up, at one of its first `n` calls of os.`name`."

    def fault(run, directory, rng, seconds):
        at = rng.randrange(n)

        def work():
            AtWrite(name, at, act)
            smoke_run(run, directory)

        found = finish(start(work))
        if found not in (0, code):
            raise RuntimeError(f"exit code {found} instead of {code}")
        if code == 28 and list(Path(directory).rglob("*.tmp")):
            raise RuntimeError("a temporary file is left")
        return int(found == code)

    return fault


def _damaged(harm):
    "The run is killed in the middle, and its newest checkpoint damaged."

    def fault(run, directory, rng, seconds):
        def work():
            AtWrite("replace", rng.randrange(8, 14), _die)
            smoke_run(run, directory)

        finish(start(work))
        kept = Checkpoints(directory)
        if not kept.steps():
            return 0
        harm(rng.choice(sorted(kept.place(kept.steps()[-1]).iterdir())), rng)
        return 1

    return fault


def _truncate(file, rng):
    os.truncate(file, rng.randrange(file.stat().st_size))


def _flip(file, rng):
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _two_at_once(run, directory, rng, seconds):
    "Two processes want the same run, and one of them is killed."
    one = start(lambda: smoke_run(run, directory))
    time.sleep(rng.uniform(0, seconds / 4))
    two = start(lambda: smoke_run(run, directory))
    time.sleep(rng.uniform(0, seconds / 2))
    os.kill(one, signal.SIGKILL)
    if finish(two) != 0:
        raise RuntimeError("the second process failed")
    return int(finish(one) != 0)


FAULTS = {
    "SIGKILL at a random moment (power, out of memory)": _signalled(signal.SIGKILL),
    "SIGKILL in the middle of writing a file": _at_write("fsync", _die_half_written, 30, -signal.SIGKILL),
    "SIGKILL before a rename": _at_write("replace", _die, 20, -signal.SIGKILL),
    "SIGTERM": _signalled(signal.SIGTERM),
    "KeyboardInterrupt (a notebook stopped)": _signalled(signal.SIGINT),
    "the disk fills up": _at_write("fsync", _full, 30, 28),
    "the newest checkpoint truncated": _damaged(_truncate),
    "a bit of the newest checkpoint flipped": _damaged(_flip),
    "two processes at once, one killed": _two_at_once,
}


def inject(fault, times, seed=0, whole=None):
    """Do `fault` (of `FAULTS`) to runs until it was done at least `times` times, let each run finish, and compare.

    A run is hit up to three times before it may finish. `whole`: {run: (outcome, seconds)} of `whole_runs`. A dict: how
    often it was `injected`, in how many `runs`; `lost` of them could not be finished, `different` ended in other bits.
    """
    rng, whole = random.Random(f"{fault} {seed}"), whole or whole_runs()
    done, runs, lost, different = 0, 0, 0, 0
    while done < times and runs < 4 * times + 8:
        run, hits = list(RUNS)[runs % len(RUNS)], 0
        runs += 1
        expected, seconds = whole[run]
        with tempfile.TemporaryDirectory() as d:
            try:
                for _ in range(rng.randint(1, 3)):
                    if not (Path(d) / "result.json").exists():
                        hits += FAULTS[fault](run, d, rng, seconds)
                finished = [finish(start(lambda: smoke_run(run, d))) for _ in range(2)] == [0, 0]  # done, and found
            except RuntimeError as e:
                finished = print(f"{fault}, {run}: {e}", file=sys.stderr)
            lost += not finished
            different += bool(finished and outcome(d) != expected)
        done += hits
    return {"fault": fault, "injected": done, "runs": runs, "lost": lost, "different": different}


def whole_runs():
    "Every run of `RUNS` without a fault: {name: (its outcome, the seconds that it takes)}."
    _warm_up()
    return {name: _whole(name) for name in RUNS}


def _whole(name):
    with tempfile.TemporaryDirectory() as d:
        begin = time.perf_counter()
        code, seconds = finish(start(lambda: smoke_run(name, d))), time.perf_counter() - begin
        if code != 0:
            raise RuntimeError(f"the run {name!r} fails without a fault")
        return outcome(d), seconds


def _warm_up():
    """Load and keep what a run needs, once.

    Every child would do it again, and take twice as long. Without a backward pass, whose threads on a GPU no fork
    survives.
    """
    with tempfile.TemporaryDirectory() as d:
        if finish(start(lambda: smoke_run("rejection sampling", d))) == 0:
            smoke_run("rejection sampling", d)  # made there, found here


def fault_table(times, seed=0):
    """What `inject` says of every fault in `times` ({fault: how often}), as a DataFrame; in a process of its own,
    since it forks.

    Needs a system with fork. RuntimeError with its last words when the process fails.
    """
    work = subprocess.run(
        [sys.executable, __file__, json.dumps(times), str(seed)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
    )
    if work.returncode != 0:
        raise RuntimeError(f"the faults could not be injected: {work.stderr[-2000:]}")
    return pd.DataFrame(json.loads(work.stdout.splitlines()[-1]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    whole = whole_runs()
    print(json.dumps([inject(fault, n, int(sys.argv[2]), whole) for fault, n in json.loads(sys.argv[1]).items()]))
