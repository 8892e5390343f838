from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.processes import ClusterProcesses, running_cluster


@pytest.fixture(scope="package")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcesses]:
    """Two prefill workers, two decode workers and two routers, for all tests of this folder."""
    folder = tmp_path_factory.mktemp("cluster")
    with running_cluster(folder, ["prefill", "prefill", "decode", "decode"], routers=2) as cluster:
        yield cluster


@pytest.fixture
def cluster(running: ClusterProcesses) -> Iterator[ClusterProcesses]:
    """The cluster with everything running, and no word of a leak in its logs afterwards."""
    running.heal()
    running.flush()
    yield running
    for worker in running.workers:
        worker.assert_quiet()
