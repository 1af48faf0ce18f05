#!/bin/sh
# Locks what the images install, with the hash of every file: `deploy/images/lock.sh [--upgrade]`. Needs uv; without
# --upgrade, versions that still fit stay as they are.
set -eu
cd "$(dirname "$0")/../.."
lock() {
    out=$1; shift
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
        --custom-compile-command deploy/images/lock.sh -o "deploy/images/$out" "$@"
}
lock requirements-cpu.lock pyproject.toml --extra cpu "${@}"
lock requirements-cuda.lock pyproject.toml --extra gpu "${@}"
printf 'hatchling>=1.26\ncyclonedx-bom>=7\n' | lock requirements-build.lock - "${@}"
