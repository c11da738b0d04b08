#!/usr/bin/env bash
# Makes a release, up to what cannot be undone: tools/release.sh 0.2.0      (CONTRIBUTING.md has the rule of version numbers)
#
# It writes the version and the changelog's heading, builds wheel and source into dist/, looks into both, installs the wheel into an empty environment, commits and tags. Then, after
# .ci/run: git push --follow-tags, which .github/workflows/release.yml publishes.
#   tools/release.sh --check 0.2.0     builds and looks only, of a tree that says 0.2.0 already
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { printf 'release: %s\n' "$*" >&2; exit 2; }

check=''
if [ "${1:-}" = --check ]; then check=1; shift; fi
version=${1:-}
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+(rc[0-9]+)?$ ]] || fail "VERSION=$version must look like 0.2.0 or 0.2.0rc1: tools/release.sh 0.2.0"
now=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' jaxlm/__init__.py)

if [ -n "$check" ]; then
  [ "$now" = "$version" ] || fail "jaxlm/__init__.py says $now, not $version"
else
  [ -z "$(git status --porcelain)" ] || fail "the working tree has changes: commit or drop them first"
  [ -z "$(git tag --list "v$version")" ] || fail "there is a tag v$version already"
  [ "$(printf '%s\n' "${now/rc/~rc}" "${version/rc/~rc}" | sort -V | tail -1)" = "${version/rc/~rc}" ] || fail "VERSION=$version is below $now, the version in jaxlm/__init__.py"
  grep -q '^## Unreleased' docs/changelog.md || fail "docs/changelog.md has no section '## Unreleased': say what has changed"
  sed -i "s/^__version__ = .*/__version__ = \"$version\"/" jaxlm/__init__.py
  sed -i "s/^## Unreleased.*/## $version, $(date -u +%Y-%m-%d)/" docs/changelog.md
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf dist
python3 -m venv "$work/build" && "$work/build/bin/pip" install -q build
"$work/build/bin/python" -m build -q --outdir dist .
python3 -m venv "$work/empty" && "$work/empty/bin/pip" install -q --no-deps "dist/jaxlm-$version-py3-none-any.whl"
(
  cd "$work" # nothing of the checkout is seen from here
  [ "$(empty/bin/jaxlm --version)" = "$version" ] || fail "the wheel says $(empty/bin/jaxlm --version), not $version"
  empty/bin/python -c 'from jaxlm import config; print("recipes in the wheel:", *sorted(p.stem for p in config.recipes_folder().glob("[a-z]*.py")))'
  empty/bin/python -c 'from jaxlm import config; assert (config.recipes_folder() / "quickstart.py").is_file() and config.recipes_folder().parent.name == "jaxlm"'
)
for file in LICENSE README.md jaxlm/cli.py configs/quickstart.py; do
  tar -tzf "dist/jaxlm-$version.tar.gz" "jaxlm-$version/$file" > /dev/null || fail "the source archive has no $file"
done
if [ -n "$check" ]; then exit 0; fi

git commit -qm "Version $version" jaxlm/__init__.py docs/changelog.md
git tag -a "v$version" -m "jaxlm $version"
echo "v$version is tagged here. Next: .ci/run, then git push --follow-tags (git tag -d v$version && git reset --hard HEAD^ takes it back)"
