"""What releases need besides the wheel: workflows with few rights, and a conda recipe as pyproject.toml says."""

import re
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import hierloss

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]


def test_actions_are_pinned_to_commits():
    """A tag can be moved to other code. Dependabot updates the commit and the comment."""
    uses = [
        line
        for path in (ROOT / ".github" / "workflows").glob("*.yml")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\buses:", line)
    ]
    assert len(uses) > 8
    pins: dict[str, set[str]] = {}
    for line in uses:
        found = re.search(r"uses: ([\w./-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)$", line)
        assert found, line
        pins.setdefault(found[1], set()).add(f"{found[2]} {found[3]}")
    assert all(len(versions) == 1 for versions in pins.values()), pins


def test_only_jobs_that_publish_may_write():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}
        rights = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
        expected = {"docs": {"publish": {"contents": "write"}}, "release": {"publish": {"id-token": "write"}}}
        assert rights == expected.get(path.stem, {})


def test_the_conda_recipe_is_that_of_the_package():
    recipe = yaml.safe_load((ROOT / "recipe" / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["context"]["version"] == hierloss.__version__
    names = {"pytorch": "torch"}  # conda's name, and PyPI's
    run = dict(line.split(" ", 1) for line in recipe["requirements"]["run"])
    found = {names.get(name, name): SpecifierSet(specifier) for name, specifier in run.items()}
    expected = {"python": SpecifierSet(metadata("hierloss")["Requires-Python"])}
    for requirement in map(Requirement, requires("hierloss")):
        if requirement.marker is None:
            expected[requirement.name] = requirement.specifier
    assert found == expected
    assert recipe["about"]["summary"] == metadata("hierloss")["Summary"]
    assert recipe["about"]["license"] == metadata("hierloss")["License-Expression"]
