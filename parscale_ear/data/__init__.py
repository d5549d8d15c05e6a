"""Pictures in and out, training crops and reference sets."""
