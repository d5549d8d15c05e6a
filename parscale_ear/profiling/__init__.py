"""Latency, memory and the roof above them."""
