"""Both sides of a comparison by the name of the case, each run once: TRL as recorded and, where it is installed, live."""

from functools import cache

import pytest
import torch

from tests.peers import record
from tests.peers.cases import OFFLINE, ONLINE
from tests.peers.group_cases import GROUPS
from tests.peers.problem import ARCHITECTURES, folders
from tests.peers.unpaired_cases import UNPAIRED

torch.set_num_threads(1)  # threads that wait for each other cost more than they give


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    return {name: folders(name, tmp_path_factory.mktemp("peers")) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def ours(paths):
    """What our module computes."""
    from tests.peers import ours, ours_group, ours_ppo, ours_unpaired

    @cache
    def run(name):
        sides = ((OFFLINE, ours), (GROUPS, ours_group), (UNPAIRED, ours_unpaired), (ONLINE, ours_ppo))
        cases, side = next((c, s) for c, s in sides if name in c)
        return side.run(cases[name], paths[cases[name].architecture])

    return run


def sources(trl):
    """The record everywhere; the trainers themselves where that TRL is installed (`make peers`)."""
    return ["recorded", "live"] if record.installed() == trl else ["recorded"]


def peer(trl, source, paths, scratch):
    """What that TRL computes, or computed."""
    if source == "recorded":
        return record.read(trl)["runs"].__getitem__
    return cache(lambda name: record.compute(name, paths, scratch))


@pytest.fixture(scope="session", params=sources("1.16.0"))
def offline(request, paths, tmp_path_factory):
    return peer("1.16.0", request.param, paths, tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="session", params=sources("1.12.0"))
def online(request, paths, tmp_path_factory):
    return peer("1.12.0", request.param, paths, tmp_path_factory.mktemp("trl"))
