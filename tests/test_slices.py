"""A queue on a bare machine: what a slice may import, what its commands say, and what they leave."""
import importlib.metadata as metadata
import json, os, re, subprocess, sys

import pytest, yaml
from packaging.requirements import Requirement

# what is there, and what has to be carried (nbs/24b_parcels.ipynb)
THERE = ("torch", "torchvision", "timm", "scipy", "pandas", "matplotlib")
CARRIED = {"pydantic", "pydantic_core", "annotated_types", "typing_inspection", "seaborn"}

# An installed package that is not allowed isn't found, as it would not be there.
BARE = """
import json, runpy, sys
installed, allowed = map(set, json.loads(sys.argv.pop(1)))
from importlib.machinery import PathFinder
class Bare:
    def find_spec(name, path=None, target=None): return None if name.partition(".")[0] in installed - allowed else PathFinder.find_spec(name, path, target)
    invalidate_caches = PathFinder.invalidate_caches
sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
try: runpy.run_module("nskd.parcels", run_name="__main__", alter_sys=True)
except SystemExit as e:
    print("imported", json.dumps(sorted({m.partition(".")[0] for m in sys.modules} & installed)))
    sys.exit(e.code)
"""


def normal(name): return re.sub(r"[-_.]+", "-", name).lower()


def needed_by(names, found):
    "The distributions that `names` need, all the way down."
    for name in map(normal, names):
        if name in found: continue
        try: requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError: continue
        found.add(name)
        needed_by([r.name for r in map(Requirement, requires) if r.marker is None or r.marker.evaluate({"extra": ""})], found)
    return found


@pytest.fixture(scope="module")
def there():
    "The import names of the packages that the bare machine has."
    found = needed_by(THERE, set())
    # PyTorch takes setuptools along, whose own copies of other packages are no one's requirement
    return {top for top, dists in metadata.packages_distributions().items() if {normal(d) for d in dists} & found} | {"nskd"}


@pytest.fixture(scope="module")
def queue(tmp_path_factory):
    "A queue of a teacher and a student on a folder of images: the digits need scikit-learn."
    from PIL import Image
    base = tmp_path_factory.mktemp("slices")
    for split, number in (("train", 24), ("test", 8)):
        for label in "abc":
            (base/"images"/split/label).mkdir(parents=True)
            for i in range(number): Image.new("L", (8, 8), ord(label) * 2 + i).save(base/"images"/split/label/f"{i}.png")
    said = {"tier": "smoke", "parameters": {"seeds": 1, "steps": 3, "checkpoint_part_mb": 0.05, "eval_every": 1},
            "jobs": [{"table": "table2", "norm": "bn", "student": "wrn16", "method": "normshift"}]}
    (base/"small.yaml").write_text(yaml.safe_dump(said))
    return base/"small.yaml"


def run(repo, queue, *words, before=("-m", "nskd.parcels"), outputs="outputs"):
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "NSKD_LASTING")} | {"NSKD_OUTPUTS": str(queue.parent/outputs), "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *before, *map(str, words)], cwd=repo, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def slice_(repo, queue, there):
    "One slice of the queue, with only what the bare machine has and what is carried there."
    allowed = [sorted(metadata.packages_distributions()), sorted(there | CARRIED)]
    return run(repo, queue, json.dumps(allowed), "run", queue, "--seconds", 600, "--dataset", queue.parent/"images", before=("-c", BARE))


def test_a_slice_needs_nothing_but_what_is_there_and_five_carried_packages(slice_, there):
    assert slice_.returncode == 0, slice_.stderr[-3000:]
    imported = set(json.loads(slice_.stdout.rpartition("imported ")[2]))
    assert imported - there == CARRIED, "the list in nbs/24b_parcels.ipynb is another"


def test_a_slice_says_what_is_done_and_publishes_it_with_its_device(slice_, queue):
    assert "wrn28-bn-wrn16-normshift-0: finished, CS " in slice_.stdout and "2 of 2 jobs are finished; 0 minutes are left" in slice_.stdout
    folder = queue.parent/"outputs/published/smoke/queue"
    runs = json.loads((folder/"runs.json").read_text())
    student = runs["wrn28-bn-wrn16-normshift-0"]
    assert student["images_seen"] == 3 * 32 * 2 and student["seconds"] > 0 and student["slices"][0]["device"]
    assert (folder/"curves.csv").read_text().count("wrn28-bn-wrn16-normshift-0") == 3
    assert f"run on {student['slices'][0]['device']}, torch " in (folder/"summary.md").read_text()


def test_it_is_packed_and_unpacked_elsewhere(repo, slice_, queue):
    packed = run(repo, queue, "pack", queue, queue.parent/"parcels", "--changed")
    assert packed.returncode == 0 and re.fullmatch(r"parcel-001: \d files, [\d.]+ MB\n", packed.stdout), packed.stdout + packed.stderr
    done = run(repo, queue, "unpack", queue, queue.parent/"parcels", outputs="elsewhere")
    assert done.returncode == 0 and re.fullmatch(r"\d+ files are whole\n", done.stdout)
    theirs = lambda where: {p.relative_to(where): p.read_bytes() for kind in ("distil", "teachers") for p in (where/kind).rglob("*") if p.is_file() and p.name != ".lock"}
    assert theirs(queue.parent/"elsewhere") == theirs(queue.parent/"outputs") != {}


def test_what_is_wrong_is_said_in_one_sentence(repo, queue, tmp_path):
    (tmp_path/"q.yaml").write_text("tier: smoke\njobs: [{table: table2, norm: bn, student: wrn61}]\n")
    done = run(repo, queue, "status", tmp_path/"q.yaml")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "did you mean 'wrn16'?" in done.stderr and done.stderr.count("\n") == 1
    done = run(repo, queue, "unpack", queue, tmp_path)
    assert done.returncode == 1 and done.stderr == f"error: there is no parcel in {tmp_path}\n"
