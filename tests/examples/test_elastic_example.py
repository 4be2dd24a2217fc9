"""``examples/elastic.py``: replicas of one address are one run. ``test_membership.py`` kills and adds some."""

import re
import sys
from unittest import mock

from launching import ROOT, free_port, run_as_torchrun

from lightning_curvadion.sync.membership import host_store


def train(rank, world, endpoint):
    words = ["elastic.py", "--join", endpoint, "--steps", "30", "--name", f"replica {rank}"]
    with mock.patch.object(sys, "argv", words):
        return run_as_torchrun(rank, world, ROOT / "examples/elastic.py", free_port())


def test_replicas_of_one_address_are_one_run(replicas):
    store = host_store(0, "127.0.0.1")
    losses = set()
    for rank, printed in enumerate(replicas.run(2, train, f"127.0.0.1:{store.port}")):
        assert f"replica {rank}: step 0, 2 replicas" in printed
        losses.add(re.search(r"ends after 30 steps at a loss of (\d\.\d+)", printed).group(1))
    assert len(losses) == 2 and all(float(loss) < 5.5 for loss in losses)
