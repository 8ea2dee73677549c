#!/usr/bin/env bash
# Everything that must hold, in one command: lint, types, import contracts, tests. Makes .venv-test when it
# is missing (or uses MMTRAIN_VENV). MMTRAIN_CI=1 leaves nothing out. Words after the name go to pytest:
#   launch/test.sh tests/config -k typo
set -euo pipefail

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export MMTRAIN_VENV=${MMTRAIN_VENV:-$launch/../.venv-test}
export MMTRAIN_EXTRAS=${MMTRAIN_EXTRAS:-dev}
# shellcheck source=launch/environment.sh
source "$launch/environment.sh"
cd "$mmtrain_root"

started=$SECONDS
summary=()
failed=0
check() { # $1: name, then the command
    local name=$1 since=$SECONDS
    shift
    echo
    echo "== $name: $*"
    if "$@"; then
        summary+=("passed  $name ($((SECONDS - since)) s)")
    else
        summary+=("FAILED  $name (exit code $?): $*")
        failed=1
    fi
}

check "lint" ruff check mmtrain tests
check "types" mypy
check "import contracts" lint-imports
selection=()
[ -z "${MMTRAIN_CI:-}" ] || selection=(-m "") # also what breaks runs on purpose, and several hosts: minutes more
parallel=(-n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder) # -n 0 after the name: one by one
check "tests" python -m pytest "${parallel[@]}" "${selection[@]}" "$@"

echo
echo "mmtrain: $([ $failed = 0 ] && echo "everything passed" || echo "something failed") in $((SECONDS - started)) s"
printf '  %s\n' "${summary[@]}"
exit $failed
