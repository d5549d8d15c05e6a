"""Recipes and the training loop; never imported by inference."""
