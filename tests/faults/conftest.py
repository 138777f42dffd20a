"""Fixtures of the store's tests."""

from tests.store.conftest import git_is_not_asked

__all__ = ["git_is_not_asked"]
