import pytest
import torch

torch.set_num_threads(1)  # threads that wait for each other cost more than they give


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Where a policy and a scalar model are exported, once."""
    return tmp_path_factory.mktemp("networks")
