#!/usr/bin/env bash
# Builds what a release uploads into dist/: wheel, sdist, bill of materials, checksums. `make release` calls it, after
# the checks and with the tools' environment: release.sh TOOLS. Uploads nothing, and changes nothing outside of dist/
# and build/. PROJECT_URL as in stage.py. The same commit and tools give the same wheel and sdist.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tools=$(realpath "$1")

if [[ -n $(git status --porcelain) ]]; then
    echo "release: the working tree differs from HEAD; a release is of a commit. Commit, or stash, what git status shows" >&2
    exit 1
fi
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
[[ -n ${PROJECT_URL:-} ]] || echo "release: no URL=https://...: the packages name no repository, and README's links to files are plain text"

rm -rf dist build/release build/installed
"$tools/bin/python" deploy/publish/stage.py build/release
# The wheel is made of the sdist, so that the sdist is known to be complete.
"$tools/bin/python" -m build --no-isolation --outdir dist build/release >build/release.log 2>&1 || { cat build/release.log >&2; exit 1; }
"$tools/bin/python" -m twine check --strict dist/*.whl dist/*.tar.gz

# Installed as a user installs it, so that the bill has what they get.
"$tools/bin/python" -m venv --without-pip build/installed
wheel=(dist/*.whl)
"$tools/bin/python" -m pip --python build/installed/bin/python install -qq "${wheel[0]}[cpu]"
version=$(build/installed/bin/forwardpass --version)
name=$(basename "${wheel[0]}" | cut -d- -f1,2)
"$tools/bin/cyclonedx-py" environment --output-reproducible --pyproject build/release/pyproject.toml --mc-type application \
    --of JSON -o "dist/$name.cdx.json" build/installed/bin/python
(cd dist && sha256sum -- * >SHA256SUMS)
echo "release: $version, of $(git rev-parse --short HEAD), in dist/:"
(cd dist && ls -l | awk 'NR > 1 { printf "  %9d  %s\n", $5, $9 }')
