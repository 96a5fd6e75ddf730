"""The built distributions: what they hold, and that the wheel works where nothing else is installed."""

import ast
import json
import runpy
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import hierloss

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
DEPENDENCIES = {"geoopt", "numpy", "pytorch-metric-learning", "torch"}

DESCRIBE_ENVIRONMENT = """
import json
from importlib.metadata import distributions, version
import hierloss
print(json.dumps({
    "file": hierloss.__file__,
    "version": hierloss.__version__,
    "metadata_version": version("hierloss"),
    "requires": {d.name: d.requires or [] for d in distributions()},
}))
"""


def run(*command: object) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Python of an environment that holds the wheel and what it depends on."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", built[1])
    return python


def test_sdist_holds_what_is_needed_to_judge_and_test_it(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "conftest.py",
        "constraints.txt",
        "pyproject.toml",
        "src/hierloss/py.typed",
        "tests/test_package.py",
    }


def test_wheel_holds_the_package_alone(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    metadata = f"hierloss-{hierloss.__version__}.dist-info"
    sources = [p for p in (ROOT / "src").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {n for n in names if not n.startswith(metadata)} == {
        p.relative_to(ROOT / "src").as_posix() for p in sources
    }
    assert {"hierloss/py.typed", "hierloss/page.html"} <= names
    assert f"{metadata}/licenses/LICENSE" in names


def requirements(built):
    """What the metadata of the wheel requires, with and without extras."""
    with zipfile.ZipFile(built[1]) as archive:
        text = archive.read(f"hierloss-{hierloss.__version__}.dist-info/METADATA").decode()
    return [Requirement(line) for line in HeaderParser().parsestr(text).get_all("Requires-Dist")]


def test_dependencies_are_exactly_four(built):
    needed = [r for r in requirements(built) if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert {r.name for r in needed} == DEPENDENCIES


def test_lowest_versions_are_the_bounds_of_the_metadata(built):
    """`make test-lowest` runs what pyproject.toml promises."""
    bounds: dict[str, Version] = {}
    for requirement in requirements(built):
        for specifier in requirement.specifier:
            if specifier.operator == ">=":
                version = Version(specifier.version)
                bounds[requirement.name] = min(version, bounds.get(requirement.name, version))
    lines = (ROOT / "requirements-lowest.txt").read_text().splitlines()
    lowest = {name: Version(pin) for name, _, pin in (line.partition("==") for line in lines if line[0] != "#")}
    assert set(lowest) >= DEPENDENCIES
    assert lowest == {name: bounds[name] for name in lowest}


def test_every_import_is_declared(built):
    """What src imports is a dependency, or in an extra for users."""
    imported = set()
    for path in (ROOT / "src" / "hierloss").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    declared = set()
    for requirement in requirements(built):
        for extra in ("", "hierarchy", "plot", "sentence-transformers"):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                declared.add(requirement.name)
    names = {"faiss": "faiss-cpu", "sklearn": "scikit-learn", "pytorch_metric_learning": "pytorch-metric-learning"}
    names["sentence_transformers"] = "sentence-transformers"
    needed = {names.get(name, name) for name in imported - sys.stdlib_module_names}
    assert needed - {"faiss-cpu"} <= declared  # PoincareKNN works without FAISS
    assert {"scipy", "scikit-learn"} <= needed


def test_wheel_works_in_an_empty_environment(installed):
    assert run(installed, "-I", "-c", "import hierloss") == ""
    found = json.loads(run(installed, "-I", "-c", DESCRIBE_ENVIRONMENT))
    assert found["version"] == found["metadata_version"] == hierloss.__version__
    assert not Path(found["file"]).is_relative_to(ROOT)
    assert Path(found["file"]).with_name("py.typed").exists()
    requires = {canonicalize_name(name): lines for name, lines in found["requires"].items()}
    needed, queue = set(), [("hierloss", "")]  # distributions and their extras: a torch with CUDA asks for some
    while queue:
        name, extra = queue.pop()
        if (name, extra) not in needed:
            needed.add((name, extra))
            requirements = [Requirement(line) for line in requires.get(name, [])]
            applying = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]
            queue += [(canonicalize_name(r.name), e) for r in applying for e in ("", *r.extras)]
    born_with = {"pip", "setuptools"}
    assert set(requires) <= {name for name, _ in needed} | born_with


def test_a_training_step_in_an_empty_environment(installed):
    run(
        installed,
        "-I",
        "-c",
        "import torch; from hierloss import HIERLoss; torch.manual_seed(0)\n"
        "embeddings = torch.randn(64, 8, requires_grad=True)\n"
        "HIERLoss(num_proxies=32)(embeddings, torch.arange(64) // 4).backward()\n"
        "assert embeddings.grad.abs().sum() > 0",
    )


def test_every_public_name_as_a_user_calls_it():
    """The types of the same file are checked by mypy."""
    runpy.run_path(str(ROOT / "tests" / "typed_user.py"))
