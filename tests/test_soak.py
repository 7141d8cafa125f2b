"""The soak test (soak.py): a minute in the normal run, and as long as `make soak MINUTES=60` says."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.clusters import Cluster
from tests.soak import SETTINGS, Storm

MINUTES = float(os.environ.get("PG_BACKGROUND_SOAK_MINUTES", "0.6"))
_FLAT_KB = 8 * 1024


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
    grown = storm.growth("launcher") + storm.growth("supervisor")
    assert not [process for process in grown if process[2] - process[1] > _FLAT_KB], figures
