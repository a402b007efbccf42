"""The oldest and the newest transformers 5 that moeprof installs with: `pytest -m compat`.

Each gets an environment of its own, which takes all but transformers from the one that runs this.
The rest of the tests run with the transformers that is installed.
"""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import transformers  # noqa: F401, its version is looked at
from wording import says

import moeprof
from moeprof import checks

if sys.version_info >= (3, 11):
    import tomllib
else:  # what pytest itself reads pyproject.toml with
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
# What of the families is expected is that of 5.24: in the oldest, some routers are others
# (docs/models.md), and OLMoE alone is held to what transformers computes.
TESTS = {
    "oldest": ("test_parity.py",),
    "newest": ("test_every_family.py", "test_parity.py", "test_seam.py", "test_families.py"),
}


def requirement():
    """What moeprof says of transformers: ">=4.57,!=5.0.*,...,<6"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["optional-dependencies"]["hf"]
    return next(line for line in needed if line.startswith("transformers"))


def excluded():
    return re.findall(r"!=(5\.\d+\.)\*", requirement())


def test_what_can_not_be_installed_is_what_is_refused(monkeypatch):
    assert tuple(excluded()) == checks.UNKNOWN
    for version in ("5.0.0", "5.5.4"):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
        with pytest.raises(ImportError) as error:
            moeprof.patch(torch.nn.Linear(2, 2))
        assert says(str(error.value), version, "5.6", "pip install")
    for version in ("4.57.6", "5.6.0", "5.50.0"):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
        with pytest.raises(ValueError, match="No routers found"):
            moeprof.patch(torch.nn.Linear(2, 2))


@pytest.mark.compat
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("end", TESTS)
def test_the_ends_of_transformers_5(end, tmp_path):
    minor = int(excluded()[-1].split(".")[1]) + 1
    wanted = requirement() if end == "newest" else f"transformers==5.{minor}.*"
    python = tmp_path / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", wanted], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(tmp_path)})
    here = sysconfig.get_path("purelib")
    Path(packages, "first.pth").write_text(f"{ROOT}\nimport site; site.addsitedir({here!r})\n")
    files = [str(ROOT / "tests" / name) for name in TESTS[end]]
    all_families = ["-m", "families or not families", "-k", "not the_sample"]
    ran = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *all_families, *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
