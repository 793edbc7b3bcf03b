"""Reproducing the competition: the same weights, the same score, the runs themselves."""
