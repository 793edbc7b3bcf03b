"""One script for each table or figure: `python -m experiments.NAME`."""

import runner  # noqa: F401  makes `from algoperf import spec` work
