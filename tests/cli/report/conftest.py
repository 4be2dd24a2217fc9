import logged_training
import pytest


@pytest.fixture(scope="session")
def trained(replicas, tmp_path_factory):
    """A folder with the logs of a CurvaDion run and a DDP run, see logged_training.py."""
    folder = tmp_path_factory.mktemp("trained")
    replicas.run(2, logged_training.train, str(folder), timeout=120)
    return folder
