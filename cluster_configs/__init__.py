"""Data that describes clusters; no code."""
