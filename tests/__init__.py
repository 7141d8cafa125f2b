"""The test-suite: `from tests.clusters import wait_until, sqlstate` works in every test module."""
