"""What the tests of a choice share with those of a worker and of a daemon."""

from tests.daemon.conftest import make_daemon
from tests.serving.conftest import build

__all__ = ["build", "make_daemon"]
