"""The release script refuses what must not be released, before it has changed anything. What it builds was looked at by hand (docs/changelog.md)."""

import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def git(folder, *arguments):
    return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def clone(tmp_path):
    """A repository with what the script reads."""
    for name in ("tools/release.sh", "jaxlm/__init__.py", "docs/changelog.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "all")
    git(tmp_path, "tag", "v7.0.0")
    return tmp_path


@pytest.mark.parametrize(("change", "arguments", "words"), [
    (None, [], "VERSION= must look like"), (None, ["v1.2"], "VERSION=v1.2 must look like"), (None, ["0.0.9"], "is below"), (None, ["7.0.0"], "tag v7.0.0"),
    (None, ["--check", "9.9.9"], "not 9.9.9"), (("docs/changelog.md", "more"), ["9.0.0"], "has changes"),
    (("jaxlm/__init__.py", '__version__ = "8.0.0"'), ["8.0.0rc1"], "is below"), (("docs/changelog.md", ""), ["9.0.0"], "no section")])
def test_what_must_not_be_released(clone, change, arguments, words):
    if change:
        (clone / change[0]).write_text(change[1] + "\n")
        if words != "has changes":
            git(clone, "commit", "-qam", "change")
    before = git(clone, "status", "--porcelain"), git(clone, "rev-parse", "HEAD")
    done = subprocess.run(["bash", clone / "tools" / "release.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert (git(clone, "status", "--porcelain"), git(clone, "rev-parse", "HEAD")) == before


def test_the_changelog_has_a_place_for_the_next_change():
    text = (ROOT / "docs" / "changelog.md").read_text()
    version = re.search(r'__version__ = "(.*)"', (ROOT / "jaxlm" / "__init__.py").read_text())[1]
    assert "## Unreleased" in text or f"## {version}, " in text
