"""One script per table or figure: `python -m experiments.NAME`."""

import runner  # noqa: F401  so that `from algoperf import spec` works
