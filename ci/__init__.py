"""Validation scripts: each can be run (`python ci/latency.py`) and imported."""
