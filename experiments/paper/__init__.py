"""The claims of the paper that this project implements (arXiv 2601.07326), measured: results/convergence/README.md."""
