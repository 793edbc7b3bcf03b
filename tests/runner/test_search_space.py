import json

import numpy as np
import pytest

from runner.search_space import read_points


def write(tmp_path, space):
    path = tmp_path / "space.json"
    path.write_text(json.dumps(space))
    return path


def test_a_list_space_gives_its_first_points(tmp_path):
    points = read_points(write(tmp_path, [{"a": i, "b": "x"} for i in range(5)]), 3, seed=0)
    assert [point._asdict() for point in points] == [{"a": i, "b": "x"} for i in range(3)]


def test_a_range_space_is_sampled_evenly_and_by_seed(tmp_path):
    space = {
        "lr": {"min": 1e-4, "max": 1e-1, "scaling": "log"},
        "momentum": {"min": 0.5, "max": 1.0, "scaling": "linear"},
        "grafting": {"feasible_points": ["adam", "sgd", "none"]},
    }
    path = write(tmp_path, space)
    points = read_points(path, 300, seed=1)
    assert points == read_points(path, 300, seed=1) != read_points(path, 300, seed=2)
    decades = np.histogram(np.log10([point.lr for point in points]), bins=[-4, -3, -2, -1])[0]
    halves = np.histogram([point.momentum for point in points], bins=[0.5, 0.75, 1.0])[0]
    thirds = [sum(point.grafting == name for point in points) for name in ("adam", "sgd", "none")]
    assert abs(decades - 100).max() <= 3  # independent random points would have a standard deviation of 8
    assert abs(halves - 150).max() <= 3
    assert abs(np.array(thirds) - 100).max() <= 3


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ([{"a": 1, "b": 2}, {"a": 1}], r"point 2 must have the keys of point 1; they differ in \['b'\]"),
        ({"lr": {"min": 0.0, "max": 1.0, "scaling": "log"}}, "lr is .*; it must be"),
        ({"lr": {"min": 1.0, "max": 0.0, "scaling": "linear"}}, "lr is .*; it must be"),
        ({"lr": {"min": 1.0, "max": 2.0}}, "lr is .*; it must be"),
        ({"lr": {"feasible_points": []}}, "lr is .*; it must be"),
        ([], "must hold a list of points"),
        ("text", "must hold a list of points"),
        ([{"not a name": 1}, {"not a name": 2}], "not a name"),
        (
            [{"a": 1}],
            r"space\.json has 1 points for 2 trials; ask for fewer \(the runner's --num_tuning_trials\), or add points",
        ),
    ],
)
def test_a_bad_search_space_is_refused(tmp_path, space, message):
    with pytest.raises(ValueError, match=message):
        read_points(write(tmp_path, space), 2, seed=0)
