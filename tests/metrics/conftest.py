"""Fixtures of the metrics tests."""

from tests.serving.conftest import build

__all__ = ["build"]
