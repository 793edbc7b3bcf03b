"""Check this project's entry to AlgoPerf's leaderboard: `python -m experiments.competition.check --submission`.

The leaderboard's repository checks the text of a pull request in .github/workflows/validate_pr.yml, and after a merge writes
submission_info.yml from it in sync_submission.yml (mlcommons/submissions_algorithms, June 2026). This does the same with
pull_request.md, and checks the folder of the submission: its files, its points, and that AlgoPerf's runner could import it.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from runner.times import BENCHMARKS

Check = tuple[str, bool, str, str]  # requirement, whether it is met, what was found, remedy

ROOT = Path(__file__).resolve().parents[2]
MARK = "[submission]"  # in the title of a pull request whose text the workflows read
REQUIRED = ("submission_name", "submission_folder", "authors", "ruleset")
OPTIONAL = ("affiliations", "version", "framework", "description")
RULESETS = {"external": "external_tuning", "self-tuning": "self_tuning"}  # value in the form: folder
SPACES = {"external": ("tuning_search_space_2026.json", 5), "self-tuning": ("self_tuning.json", 1)}  # file, number of points
TODO = "TODO"
GPUS = 4
FUNCTIONS = ("get_batch_size", "init_optimizer_state", "update_params", "prepare_for_eval", "data_selection")
IMPORT = """\
import importlib, json, sys
sys.path.insert(0, {root!r})
import runner  # makes algoperf.spec importable where AlgoPerf is not installed
sys.path[0] = {folder!r}  # the project's own modules must not stand in for those of the folder
module = importlib.import_module({module!r})
sizes = {{name: module.get_batch_size(name) for name in {workloads!r}}}
print(json.dumps([dir(module), sizes, "shampoo" in sys.modules]))
"""


def submission_files(root: Path) -> list[str]:
    """Return the files of the submission under both rulesets, without search spaces, relative to the project's folder."""
    package = sorted(str(path.relative_to(root)) for path in (root / "shampoo").glob("*.py"))
    return ["submission.py", "submission_info.yml", "requirements.txt", "self_tuning.json", *package]


def read_form(text: str) -> dict[str, str]:
    """Return the fields of the first YAML block of a pull request, or of submission_info.yml, as the workflows read them: each
    line is cut at "#" and stripped. Raise ValueError if there is no block, or if it is no YAML mapping.
    """
    text = text.replace("\r\n", "\n")
    if "```" in text:
        start = text.find("```yaml\n")
        end = text.find("\n```", start + len("```yaml\n"))
        if min(start, end) < 0:
            raise ValueError("it has no block between the lines ```yaml and ```")
        text = text[start + len("```yaml\n") : end]
    try:
        fields = yaml.safe_load("\n".join(line.split("#")[0].strip() for line in text.split("\n")))
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise ValueError("it has no fields")
    return {str(name): str(value).strip() if value else "" for name, value in fields.items()}


def destination(fields: dict[str, str]) -> str:
    """Return the folder that the workflow writes submission_info.yml to; the submission must be there too."""
    name = re.sub(r"^(external_tuning|self_tuning)/", "", fields.get("submission_folder", "").strip("/"))
    return f"submissions/{RULESETS.get(fields.get('ruleset', ''), 'self_tuning')}/{name}"


def check_form(text: str, info: str) -> Iterator[Check]:
    """Check the text of the pull request, and that submission_info.yml has the same fields."""
    title = re.search(r"Title: *(.*?) *-->", text)
    yield (
        "title of the pull request",
        title is not None and MARK in title[1],
        title[1] if title else "none",
        f"begin pull_request.md with <!-- Title: {MARK} NAME -->",
    )
    try:
        fields, same = read_form(text), read_form(info)
    except ValueError as error:
        yield "form of the pull request", False, str(error), "see the template of the leaderboard's repository"
        return
    for name in (*REQUIRED, *OPTIONAL):
        value = fields.get(name, "")
        remedy = "a person must fill it in, in pull_request.md and submission_info.yml" if value == TODO else "fill it in"
        yield name, bool(value) and value != TODO, value or "empty", remedy
    allowed = {"ruleset": tuple(RULESETS), "framework": ("PyTorch",)}
    for name, values in allowed.items():
        yield f"known {name}", fields.get(name) in values, fields.get(name, "none"), f"write {' or '.join(values)}"
    path = destination(fields)
    name = path.rpartition("/")[2]
    known = name.isidentifier() and name.islower()
    yield "folder of the submission", known, path, "use a lowercase name without / . - or spaces"
    expanded = [name for name, value in fields.items() if set("$`\\") & set(value)]
    found = f"{', '.join(expanded)} with $, `, or \\" if expanded else "as they are"
    yield "fields in the workflow's shell", not expanded, found, "remove $, `, and \\, which it would expand"
    differing = sorted(name for name in fields.keys() | same.keys() if fields.get(name) != same.get(name))
    found = f"differs in {', '.join(differing)}" if differing else "the same fields"
    yield "submission_info.yml", not differing, found, "copy the form from pull_request.md"


def check_import(root: Path, target: str) -> Check:
    """Check that the submission can be imported from its folder, as AlgoPerf's runner does, and knows all workloads."""
    workloads = BENCHMARKS["2026"]["base_workloads"]
    with tempfile.TemporaryDirectory() as folder:
        submission = Path(folder) / target
        for file in submission_files(root):
            (submission / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / file, submission / file)
        (submission / "__init__.py").touch()
        module = f"{target.replace('/', '.')}.submission"
        code = IMPORT.format(folder=folder, root=str(ROOT), module=module, workloads=workloads)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    what = "import as AlgoPerf does it"
    if done.returncode:
        return what, False, (done.stderr.strip().splitlines() or ["it fails"])[-1], f"correct {module}"
    names, sizes, outside = json.loads(done.stdout.splitlines()[-1])
    odd = [name for name, size in sizes.items() if size % GPUS]
    wrong = [name for name in FUNCTIONS if name not in names] + [f"a batch size of {name} divisible by {GPUS}" for name in odd]
    if outside:
        return what, False, "it imports shampoo from outside its folder", "use relative imports, such as from .shampoo import"
    return what, not wrong, f"without {', '.join(wrong)}" if wrong else module, "define what is missing in submission.py"


def check_points(root: Path, ruleset: str) -> Check:
    """Check the number of points, and that all have the same keys, since AlgoPerf makes a type from the first one's."""
    name, count = SPACES[ruleset]
    try:
        points = json.loads((root / name).read_text())
    except (OSError, ValueError) as error:
        return name, False, str(error), f"write a JSON list of {count} objects"
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        return name, False, "no list of objects", f"write a JSON list of {count} objects"
    alike = len({tuple(point) for point in points}) == 1
    return name, len(points) == count and alike, f"{len(points)} of {count} points", f"write {count}, all with the same keys"


def check_submission(root: Path) -> Iterator[Check]:
    """Check the form, then the files, the points, and the import. Without files, check no more."""
    files = ["pull_request.md", *submission_files(root)]
    absent = [name for name in files if not (root / name).is_file()]
    yield "files", not absent, f"without {', '.join(absent)}" if absent else f"all {len(files)}", "restore them"
    if absent:
        return
    text, info = ((root / name).read_text() for name in ("pull_request.md", "submission_info.yml"))
    checks = list(check_form(text, info))
    yield from checks
    if any(what == "form of the pull request" for what, *_ in checks):
        return
    fields = read_form(text)
    if fields.get("ruleset") in SPACES:
        yield check_points(root, fields["ruleset"])
        yield check_import(root, destination(fields))
