"""Fixtures for all tests; each kind of server has its own module."""
