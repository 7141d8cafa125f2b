"""The soak test (soak.py), as long as `make soak MINUTES=60` says; not in the normal run."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.clusters import Cluster
from tests.soak import SETTINGS, Storm

MINUTES = float(os.environ.get("PG_BACKGROUND_SOAK_MINUTES", "0.6"))
_FLAT_KB = 8 * 1024
_MINUTES_FOR_MEMORY = 5  # before, processes still warm up


@pytest.mark.skipif("PG_BACKGROUND_SOAK_MINUTES" not in os.environ, reason="make soak runs it")
@pytest.mark.local_server
@pytest.mark.timeout(MINUTES * 60 + 600)
@pytest.mark.parametrize("setup", [os.environ.get("PG_BACKGROUND_SOAK_SETUP", "trust")])
def test_every_job_is_accounted_for(
    start_cluster: Callable[..., Cluster], capsys: pytest.CaptureFixture[str], setup: str
) -> None:
    storm = Storm(start_cluster(setup, SETTINGS), MINUTES * 60)
    figures = storm.run()
    with capsys.disabled():
        print("\n" + figures)
    assert not storm.wrong, figures
    assert sum(storm.kills.values()) > MINUTES * 20
    if MINUTES < _MINUTES_FOR_MEMORY:
        return
    grown = storm.growth("launcher") + storm.growth("supervisor")
    assert not [process for process in grown if process[2] - process[1] > _FLAT_KB], figures
