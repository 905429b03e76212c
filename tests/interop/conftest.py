"""Set-up shared by the tests of damaged files and folders."""

import pytest


@pytest.fixture(scope="module")
def sources(request, tmp_path_factory):
    """A folder of what the module's ``write_sources`` writes: intact files to start from."""
    folder = tmp_path_factory.mktemp("intact")
    request.module.write_sources(folder)
    return folder
