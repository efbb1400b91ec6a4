# shellcheck shell=bash
# Sourced by the tools beside it: make_venv EXTRAS makes .venv in the checkout and installs Tink there,
# editable, with these extras of pyproject.toml. Once that is done it costs nothing, until
# pyproject.toml, the Python or this file changes. PYTHON picks the interpreter (default python3).

# Named, and installed first, so that pip is free to take a build for the CPU where it is offered one.
# An open requirement would fetch the newest release, which on Linux is gigabytes of CUDA.
TORCH=torch==2.13.0

# A virtual environment with pip. Debian's Python cannot put pip there unless python3-venv is installed;
# Debian's pip can.
new_venv() {
    local python=${PYTHON:-python3}
    "$python" -m venv "$1" >/dev/null 2>&1 || {
        "$python" -m venv --clear --without-pip "$1"
        "$python" -m pip --python "$1/bin/python" --disable-pip-version-check install --quiet pip
    }
}

make_venv() {
    local extras=$1 python=${PYTHON:-python3} want stamp
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "${0##*/}: needs Python 3.11 or newer; set PYTHON to one ($python is not)" >&2
        return 1
    fi
    stamp=.venv/installed-${extras//,/-}
    want=$({
        cat pyproject.toml tools/venv.sh
        identity "$python"
    } | cksum)
    if [[ -f $stamp && $(<"$stamp") == "$want" ]]; then
        return
    fi

    # One of another Python, or one that was interrupted, is made anew.
    if [[ $(identity .venv/bin/python) != "$(identity "$python")" ]] ||
        ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        echo "making .venv" >&2
        rm -rf .venv
        new_venv .venv
    fi
    echo "installing Tink and its requirements into .venv (the first time takes a few minutes)" >&2
    local pip=(.venv/bin/python -m pip --disable-pip-version-check install) log=.venv/install.log
    if ! { "${pip[@]}" "$TORCH" && "${pip[@]}" --editable ".[$extras]" "$TORCH"; } >"$log" 2>&1; then
        cat "$log" >&2
        return 1
    fi
    echo "$want" >"$stamp"
}

identity() {
    "$1" -c 'import sys; print(sys.version, sys.base_prefix)' 2>/dev/null || true
}
