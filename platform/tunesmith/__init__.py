"""The core of Tunesmith: the platform's words, rules and records. Imports no torch and no FastAPI."""

__version__ = "0.1.0"
