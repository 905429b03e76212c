"""Fixtures of the command line's tests."""

import pytest

from worldloom.cli import main


@pytest.fixture
def run_command(capsys):
    """Run a command: (exit code, stdout, stderr)."""

    def run(*words):
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run
