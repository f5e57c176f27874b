"What the tests share."

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch loads; kernels started by tests inherit it


# by what they take; in the Makefile's order of files they are begun first, so that no worker waits for one at the end
LONGEST = (
    "test_faults",
    "test_budget",
    "test_distill_notebook",
    "test_tables",
    "test_grid",
    "test_benchmark",
    "test_parallel",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def repo():
    "The repository's root."
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared(repo):
    "The folder shared/ beside the repository, which a clone need not have."
    folder = repo.parent / "shared"
    if not folder.is_dir():
        pytest.skip("there is no folder shared/ beside the repository")
    return folder


@pytest.fixture(scope="module")
def smoke(repo, tmp_path_factory, request):
    """The notebooks in the module's CLAIMS at the smoke tier, into one folder, where they share teachers.

    (folder, {name: how it ended}).
    """
    from test_tables import smoke_runs

    base = tmp_path_factory.mktemp(request.module.__name__)
    return base, smoke_runs(repo, base, request.module.CLAIMS)
