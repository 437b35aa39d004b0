"""One private cluster for all tests of this folder. They run only with `make test-slurm`."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_programs

ASKED = "TEST_SLURM"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    reason = None
    if ASKED not in os.environ:
        reason = "the tests start daemons: run make test-slurm"
    elif missing := missing_programs():
        reason = f"missing programs: {', '.join(missing)}; install slurm-wlm and munge"
    for item in items:
        if reason is not None and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
