#!/bin/sh
# Print the Python for `make gpu`: .venv with everything, or python3 as it is where no package can be installed.
#
#   PYTHON=...   the Python to fall back on (default: python3)
set -eu
unset CDPATH
cd -- "$(dirname -- "$0")/.."

python=${PYTHON:-python3}
say() { printf '%s\n' "$*" >&2; }

reachable() { # whether pip can fetch a package, in a few seconds
    folder=$(mktemp -d)
    "$python" -m pip download -q --no-deps --timeout 5 --retries 0 -d "$folder" tyro >/dev/null 2>&1 && code=0 || code=1
    rm -rf "$folder"
    return $code
}

if [ -e .venv/.dantinox ] || reachable; then
    if sh scripts/setup.sh dev triton peers >&2; then
        echo .venv/bin/python
        exit
    fi
fi
if "$python" -c 'import jax' 2>/dev/null; then
    say "gpu: no package can be installed here; $python measures with the packages it has"
    echo "$python"
else
    say "gpu: no package can be installed here, and $python has no jax; set PYTHON to one that has"
    exit 1
fi
