"""The entry to the leaderboard: its form, its folder, and what the check says of mistakes in either."""

import shutil
from pathlib import Path

import pytest

from experiments.competition.leaderboard import (
    check_form,
    check_import,
    check_points,
    check_submission,
    destination,
    read_form,
    submission_files,
)

ROOT = Path(__file__).parents[2]
TEXT, INFO = ((ROOT / file).read_text().replace('"TODO"', '"Jane Doe"') for file in ("pull_request.md", "submission_info.yml"))
TARGET = "submissions/self_tuning/adamw_shampoo"


def missing(checks):
    """Return what is missing, with what was found and the remedy."""
    return {what: f"{found}; {remedy}" for what, met, found, remedy in checks if not met}


def replace(text, old, new):
    """Replace text that must be there."""
    assert old in text
    return text.replace(old, new)


@pytest.mark.slow
def test_only_what_a_person_must_fill_in_is_missing():
    found = missing(check_submission(ROOT))
    assert set(found) == {"authors", "affiliations"}
    assert all("TODO; a person must fill it in" in text for text in found.values())


@pytest.mark.parametrize("ruleset", ["self-tuning", "external"])
def test_a_filled_in_entry_is_ready(ruleset):
    text, info = (replace(form, '"self-tuning"', f'"{ruleset}"') for form in (TEXT, INFO))
    assert missing([*check_form(text, info), check_points(ROOT, ruleset)]) == {}
    assert destination(read_form(text)) == f"submissions/{ruleset.replace('-tuning', '')}_tuning/adamw_shampoo"


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('"AdamW-style Shampoo"', '""', "submission_name"),
        ('authors: "Jane Doe"', 'authors: "  "', "authors"),
        ('"self-tuning"', '"self"', "known ruleset"),
        ('"PyTorch"', '"JAX"', "known framework"),
        ('"adamw_shampoo"', '"adamw-shampoo"', "folder of the submission"),
        ("averaged weights", "averaged $weights", "fields in the workflow's shell"),
    ],
)
def test_each_mistake_in_the_form_is_named(old, new, what):
    assert list(missing(check_form(replace(TEXT, old, new), replace(INFO, old, new)))) == [what]


def test_mistakes_around_the_form_are_named():
    assert list(missing(check_form(replace(TEXT, "[submission] ", ""), INFO))) == ["title of the pull request"]
    assert list(missing(check_form(TEXT.partition("\n")[2], INFO))) == ["title of the pull request"]
    assert list(missing(check_form(replace(TEXT, "```yaml", "```"), INFO))) == ["form of the pull request"]
    assert list(missing(check_form(TEXT, replace(INFO, "version: ", "version ")))) == ["form of the pull request"]
    assert list(missing(check_form(TEXT, replace(INFO, '"1.0"', '"1.1"')))) == ["submission_info.yml"]


def test_the_form_is_read_as_the_workflow_reads_it():
    """It finds the first block, whatever the line ends, and cuts each line at "#", even in quotation marks."""
    text = '```yaml\r\nauthors: "A, B"  # names\r\n  ruleset: "external"\r\nversion:\r\n```\r\n```yaml\r\nauthors: C\r\n```'
    assert read_form(text) == {"authors": "A, B", "ruleset": "external", "version": ""}
    with pytest.raises(ValueError, match="no YAML"):
        read_form('```yaml\ndescription: "number #1"\n```')
    assert destination({"submission_folder": "/external_tuning/name/", "ruleset": "other"}) == "submissions/self_tuning/name"


@pytest.mark.parametrize("text", ["[]", "[{}, {}]", "{", "[1]", '{"a": 1}'])
def test_points_that_algoperf_could_not_read_are_named(tmp_path, text):
    (tmp_path / "self_tuning.json").write_text(text)
    assert list(missing([check_points(tmp_path, "self-tuning")])) == ["self_tuning.json"]
    assert list(missing([check_points(tmp_path, "external")])) == ["tuning_search_space_2026.json"]


def test_missing_files_are_named(tmp_path):
    assert "submission_info.yml" in missing(check_submission(tmp_path))["files"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("import functools", "import functools, nothing_of_the_kind", "No module named 'nothing_of_the_kind'"),
        ("from .shampoo import", "from shampoo import", "it imports shampoo from outside its folder"),
        ('"finewebedu_lm": 64', '"finewebedu_lm": 63', "a batch size of finewebedu_lm divisible by 4"),
        ("def data_selection", "def select_data", "without data_selection"),
    ],
)
def test_what_algoperf_could_not_import_is_named(tmp_path, old, new, named):
    for file in submission_files(ROOT):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "submission.py").write_text(replace((ROOT / "submission.py").read_text(), old, new))
    assert named in missing([check_import(tmp_path, TARGET)])["import as AlgoPerf does it"]
