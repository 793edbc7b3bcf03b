"""Reproduce the competition: its weights, its scores, and the commands that run it."""
