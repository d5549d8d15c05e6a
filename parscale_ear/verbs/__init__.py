"""The verbs of ``parscale-ear``; PyTorch is imported when one runs, not before."""
