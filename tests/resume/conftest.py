"""A server that forks runs, started once, and the runs that nobody interrupted."""

import pytest

from tests.resume.runs import Crew


@pytest.fixture(scope="session")
def crew(tmp_path_factory):
    return Crew(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="session")
def whole(crew):
    """Gives the folder of an uninterrupted run; each is run once."""
    done = {}

    def finished(method, *more, ranks=1):
        key = (method, more, ranks)
        if key not in done:
            done[key] = crew.finish(method, f"{method}-whole-{len(done)}", *more, ranks=ranks)
        return done[key]

    return finished
