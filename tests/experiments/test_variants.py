import numpy as np
import pandas as pd
import pytest

from experiments.variants import compare, steps_of


def test_ratios_are_paired_by_seed_and_count_misses():
    def trial(submission, study, steps, last):
        return {
            "submission": submission,
            "workload": "w",
            "study": study,
            "steps": steps,
            "evaluations": pd.DataFrame({"global_step": [1, last]}),
        }

    trials = [trial(name, s, steps * (s + 1), 900) for name, steps in (("eigh", 100.0), ("qr", 110.0)) for s in range(3)]
    trials += [trial("bad", s, np.inf, 100 * (s + 1) - 1) for s in range(3)]
    table = compare(steps_of(pd.DataFrame(trials)), "eigh")
    assert table.loc["qr"].to_list() == pytest.approx([1.1, 1.1, 1.1, 0])
    assert table.loc["bad"].to_list() == pytest.approx([1.0, 1.0, 1.0, 3])
