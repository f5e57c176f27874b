"""Every loader against 500 damaged and hostile files (`make fuzz` has 10,000), and the fuzzer against loaders that
are worse.
"""

import ctypes
import os
import pickle
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fuzz


def test_damaged_and_hostile_files_are_read_or_refused():
    cases = fuzz.fuzz(500, seed=1)
    assert not fuzz.findings(cases), "\n".join(map(str, fuzz.findings(cases)))
    assert len(cases) == 500 and {c.target for c in cases} == set(fuzz.TARGETS)
    for name in fuzz.TARGETS:
        assert any(c.outcome == "refused" for c in cases if c.target == name), f"{name}: no file was damaged enough"
    assert sum(c.outcome == "read" for c in cases) > 10, "nothing was left whole"
    assert all(c.said for c in cases if c.outcome == "refused")


def _loop(path):
    while True:
        pass


def _wait(path):
    time.sleep(60)


def _crash(path):
    ctypes.string_at(0)


def _climb(path):
    Path(path).parent.parent.parent.joinpath("canary/evil").touch()


def _lines(path):
    raise ValueError("two\nlines")


@pytest.mark.parametrize(
    "read, outcome",
    [
        (lambda path: [][0], "IndexError"),
        (_lines, "several lines"),
        (_climb, "outside its folder"),
        (_loop, "more than"),
        (_wait, "signal 9"),
        (_crash, "signal 11"),
        (lambda path: bytearray(2**40), "MemoryError"),
        (lambda path: os._exit(3), "ended early"),
        (lambda path: pickle.loads(Path(path).read_bytes()), "outside its folder"),
        (lambda path: Path("beside").touch(), None),
    ],
)
def test_the_fuzzer_notices(read, outcome, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    if read is _wait:
        monkeypatch.setattr(fuzz, "WAIT", 2)

    def damage(data, rng, canary):
        return pickle.dumps(fuzz.Payload(fuzz.payload(canary)))

    target = fuzz.Target(1, lambda: [pickle.dumps("harmless")], damage, read)
    cases = fuzz.fuzz(3, targets={"bad": target})
    found = fuzz.findings(cases)
    assert sorted(c.number for c in cases) == [0, 1, 2]  # the others are read all the same
    if outcome is None:
        assert not found
    else:
        assert found and all(outcome in c.outcome for c in found), found


def test_a_case_is_the_same_again():
    target = {
        "bytes": fuzz.Target(
            1, lambda: [bytes(range(256))], lambda data, rng, canary: fuzz.damage(data, rng), lambda path: None
        )
    }
    originals, root = {"bytes": [bytes(range(256))]}, Path("canary")
    made = [fuzz.make(n, 0, target, originals, root) for n in range(50)]
    assert made == [fuzz.make(n, 0, target, originals, root) for n in range(50)] and len(set(made)) > 40
