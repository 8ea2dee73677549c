# For scripts (by hand: source .venv/bin/activate). Source this file: afterwards `python` and `mmtrain` are
# those of the project's own virtual environment, made and filled on the first call. Works from any folder.
#
#   MMTRAIN_VENV     the environment to use (default: .venv in the checkout); made when it does not exist
#   MMTRAIN_EXTRAS   extras of pyproject.toml to install, such as dev or dev,hf (default: none)
#   MMTRAIN_PYTHON   the Python that makes the environment (default: the first of python3, python3.13, ... that fits)

mmtrain_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

mmtrain_stop() { # one sentence, then the exit code of a mistake that the user can mend
    echo "mmtrain: $*" >&2
    exit 2
}

mmtrain_find_python() {
    local candidate
    for candidate in ${MMTRAIN_PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    mmtrain_stop "no Python 3.11 or newer was found; install one (Debian: apt-get install python3 python3-venv)" \
        "or name it with MMTRAIN_PYTHON=/path/to/python3"
}

mmtrain_make_venv() { # $1: folder
    local python
    python=$(mmtrain_find_python) || exit 2
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        mmtrain_stop "$python cannot make virtual environments; install its venv package" \
            "(Debian: apt-get install python3-venv), then start this script again"
    echo "Making the virtual environment $1 with $("$python" --version) ..."
    "$python" -m venv "$1" || mmtrain_stop "the virtual environment $1 could not be made; see the lines above"
}

mmtrain_install() { # $1: environment, $2: extras
    local log=$1/install.log target=$mmtrain_root
    [ -z "$2" ] || target="$mmtrain_root[$2]"
    echo "Installing mmtrain and what it needs into $1 (some minutes, this once; log: $log) ..."
    # torch first and alone: packages that look for it while they are built then find it, and the right one.
    {
        "$1/bin/python" -m pip install --constraint "$mmtrain_root/launch/constraints.txt" torch &&
            "$1/bin/python" -m pip install --constraint "$mmtrain_root/launch/constraints.txt" --editable "$target"
    } >"$log" 2>&1 || {
        tail -n 5 "$log" >&2
        mmtrain_stop "the installation failed, its last lines are above and all of them in $log;" \
            "check the network and the free disk space (about 3 GB), then start this script again"
    }
}

mmtrain_environment() {
    local venv=${MMTRAIN_VENV:-$mmtrain_root/.venv} extras=${MMTRAIN_EXTRAS:-} wanted
    # Another pyproject.toml, constraint, extra or place of the checkout: install again. Else: nothing to do.
    wanted=$(cat "$mmtrain_root/pyproject.toml" "$mmtrain_root/launch/constraints.txt" |
        { cat; echo "$extras $mmtrain_root"; } | sha256sum | cut -d' ' -f1)
    if [ ! -x "$venv/bin/python" ]; then
        mmtrain_make_venv "$venv"
    elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        mmtrain_stop "$venv has no working pip, perhaps it was interrupted while it was made; remove it and start again"
    fi
    if [ "$(cat "$venv/mmtrain.stamp" 2>/dev/null)" != "$wanted" ]; then
        mmtrain_install "$venv" "$extras"
        echo "$wanted" >"$venv/mmtrain.stamp"
    fi
    venv=$(cd "$venv" && pwd)
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
    unset PYTHONHOME
}

mmtrain_environment
