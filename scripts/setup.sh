#!/bin/sh
# Make the environment ready: find a Python, create .venv, install DantinoX with the extras asked for.
# Returns at once if everything is installed already.
#
#   scripts/setup.sh [extra...]     the extras of pyproject.toml; an NVIDIA GPU adds `cuda` by itself, a TPU `tpu`
#
#   ACCEL=cpu|cuda|tpu   overrides the detected accelerator
#   PYTHON=...           the Python to build with: 3.12, 3.13 or 3.14
#   VENV=.venv           where to build
#   CONSTRAINTS=FILE     the versions to install (constraints.txt); /dev/null: the newest that pyproject.toml allows
set -eu
unset CDPATH
cd -- "$(dirname -- "$0")/.."

venv=${VENV:-.venv}
constraints=${CONSTRAINTS:-constraints.txt}
stamp=$venv/.dantinox     # written last: the environment is complete, with this key and these extras
marker=$venv/.installing  # exists during an install: if it exists later, that install was interrupted

say() { printf '%s\n' "$*" >&2; }
die() { say "setup: $*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
has_word() { case " $1 " in *" $2 "*) ;; *) return 1 ;; esac; }

# --- the key of the environment, and the extras including the accelerator's ---

key="$(cat pyproject.toml "$constraints" | cksum) $PWD"
root=${SYSTEM_ROOT:-} # where /dev and /sys are, for tests
# What decides about the accelerator: nvidia-smi itself is too slow for every call.
probe="$(command -v nvidia-smi || :) $(echo /dev/nvidia[0-9]* "$root"/dev/accel[0-9]* "$root"/dev/vfio/[0-9]*)"
probe="$probe ${TPU_WORKER_ID:-}${TPU_ACCELERATOR_TYPE:-}"

read_stamp() {
    old_key='' old_extras='' old_probe='' old_gpu=''
    [ -f "$stamp" ] || return 0
    { IFS= read -r old_key; IFS= read -r old_extras; IFS= read -r old_probe; IFS= read -r old_gpu; } <"$stamp" || :
}

detect_gpu() { # prints the extra for the GPU of this machine, or nothing
    have nvidia-smi && nvidia-smi -L 2>/dev/null </dev/null | grep -q '^GPU ' || return 0
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null </dev/null | head -n 1)
    case ${driver%%.*} in
        [1-4]?? | 5[0-7]?) echo cuda12 ;; # CUDA 13 needs driver 580
        *) echo cuda ;;
    esac
}

has_tpu() { # whether this is a Cloud TPU VM, or a container with TPUs
    for file in "$root"/dev/accel[0-9]* "$root"/dev/vfio/[0-9]*; do
        [ -e "$file" ] || continue
        case $file in "$root"/dev/accel*) return 0 ;; esac
        # Newer TPUs have the same files as any device that is passed to a virtual machine.
        [ -z "${TPU_WORKER_ID:-}${TPU_ACCELERATOR_TYPE:-}" ] || return 0
        for device in "$root"/sys/bus/pci/devices/*; do
            [ -r "$device/vendor" ] && [ -r "$device/device" ] || continue
            read -r vendor <"$device/vendor" || :
            read -r model <"$device/device" || :
            case $vendor:$model in # Google's v3, v4, v5p, v5e, v6e, 7x, 8i, 8t; its network card is another model
                0x1ae0:0x0027 | 0x1ae0:0x005[6e] | 0x1ae0:0x006[23f] | 0x1ae0:0x007[6c] | 0x1ae0:0x0083) return 0 ;;
            esac
        done
        return 1
    done
    return 1
}

detect() { # prints the extra for the accelerator of this machine, or nothing
    found=$(detect_gpu)
    if [ -z "$found" ] && has_tpu; then found=tpu; fi
    echo "$found"
}

set_wanted() {
    gpu=$old_gpu
    [ "$probe" = "$old_probe" ] || gpu=$(detect)
    case ${ACCEL:-auto} in
        auto) accel=$gpu ;;
        cpu) accel='' ;;
        cuda) case $gpu in cuda*) accel=$gpu ;; *) accel=cuda ;; esac ;;
        tpu) accel=tpu ;;
        *) die "ACCEL=$ACCEL is not known; use cpu, cuda or tpu" ;;
    esac
    wanted=$old_extras
    for extra in $accel "$@"; do
        has_word "$wanted" "$extra" || wanted="${wanted:+$wanted }$extra"
    done
}

# --- a Python that runs, not a shim that only prints a version ---

check='
import os, sys
fits = (3, 12) <= sys.version_info[:2] < (3, 15) and sys.implementation.name == "cpython" and "t" not in sys.abiflags
venv = all(os.path.isdir(os.path.join(os.path.dirname(os.__file__), name)) for name in ("venv", "ensurepip"))
print("fits" if fits else "misfit", "venv" if venv else "bare", "%d.%d.%d" % sys.version_info[:3], sys.base_prefix)
'
about() { "$1" -IS -c "$check" 2>/dev/null </dev/null; }

fits() { # fits PYTHON: sets $version, or adds the reason to $seen
    answer=$(about "$1") || return 1
    version=${answer#* * }
    version=${version%% *}
    case $answer in
        "fits venv "*) return 0 ;;
        "fits bare "*) have uv && return 0; note="$version without its venv module" ;;
        "misfit "*) note=$version ;;
        *) return 1 ;;
    esac
    case ", $seen, " in *", $note, "*) ;; *) seen="${seen:+$seen, }$note" ;; esac
    return 1
}

candidates() {
    for name in python3.14 python3.13 python3.12 python3 python; do
        old_ifs=$IFS
        IFS=:
        for dir in $PATH; do
            [ ! -x "$dir/$name" ] || printf '%s\n' "$dir/$name"
        done
        IFS=$old_ifs
    done
    for root in "$(pyenv root 2>/dev/null || :)" "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
        [ -d "$root/versions" ] || continue
        for minor in 14 13 12; do
            for python in "$root"/versions/3."$minor"*/bin/python; do
                [ ! -x "$python" ] || printf '%s\n' "$python"
            done
        done
    done
    uv python find '>=3.12,<3.15' 2>/dev/null || :
}

find_python() { # sets $python and $version
    seen=''
    if [ -n "${PYTHON:-}" ]; then
        python=$PYTHON
        fits "$python" || die "PYTHON=$PYTHON ${seen:+is $seen, which }does not do; give a Python 3.12, 3.13 or 3.14 with venv"
        return
    fi
    list=$(candidates)
    while IFS= read -r python; do
        if [ -n "$python" ] && fits "$python"; then return; fi
    done <<END
$list
END
    die "no Python 3.12, 3.13 or 3.14 here${seen:+ (only $seen)}; install one" \
        "(apt install python3-venv, brew install python@3.13, pyenv install 3.13, uv python install) or set PYTHON=/path/to/python"
}

# --- the environment ---

venv_runs() { # the environment's Python runs, and is the one that PYTHON names
    venv_python=$(about "$venv/bin/python") || return 1
    case $venv_python in "fits "*) ;; *) return 1 ;; esac
    [ -z "${PYTHON:-}" ] || [ "$venv_python" = "$(about "$PYTHON")" ]
}

is_ready() { # is_ready EXTRA...
    read_stamp
    set_wanted "$@"
    [ "$key" = "$old_key" ] && [ "$wanted" = "$old_extras" ] && venv_runs
}

take_lock() {
    if have flock; then
        exec 9>>"$venv.lock"
        flock -n 9 || { say "Another setup is at work here; waiting for it."; flock 9; }
        return
    fi
    waited=''
    until mkdir "$venv.lock.d" 2>/dev/null; do
        owner=$(cat "$venv.lock.d/pid" 2>/dev/null || :)
        if [ -n "$owner" ] && ! kill -0 "$owner" 2>/dev/null; then rm -rf "$venv.lock.d"; continue; fi
        [ -n "$waited" ] || say "Another setup is at work here; waiting for it."
        waited=yes
        sleep 1
    done
    trap 'rm -rf "$venv.lock.d"' EXIT
    trap 'exit 130' INT TERM
    echo $$ >"$venv.lock.d/pid"
}

create() {
    find_python
    say "Creating $venv with Python $version ($python)"
    rm -rf "$venv"
    mkdir -p "$venv"
    : >"$marker"
    if have uv; then uv venv --quiet --allow-existing --python "$python" "$venv"; else "$python" -m venv "$venv"; fi
}

install() { # install EXTRAS
    say "Installing DantinoX${1:+ with $1} (one time, about a minute) ..."
    package=.
    [ -z "$1" ] || package=".[$(echo "$1" | tr ' ' ,)]"
    if have uv; then
        set -- uv pip install --quiet --python "$venv/bin/python"
    else
        set -- "$venv/bin/python" -m pip install -qq --no-compile --disable-pip-version-check --no-input
    fi
    "$@" -c "$constraints" -e "$package" || die "the install failed; the lines above say why. The next call starts it again."
}

warm_up() { # checks the imports that every program needs, and compiles their bytecode only
    PYTHONDONTWRITEBYTECODE='' "$venv/bin/python" -c '
import flax.nnx, jax.experimental.pallas, optax, orbax.checkpoint, rich, tokenizers, tyro, yaml
import dantinox.cli.train, matplotlib.figure, tensorboard.summary.writer.event_file_writer' ||
        die "installed, but an import fails; the lines above say which"
}

for extra in "$@"; do
    grep -q "^$extra = \[" pyproject.toml || die "no extra is named $extra; see [project.optional-dependencies] in pyproject.toml"
done
is_ready "$@" && exit 0
take_lock
is_ready "$@" && exit 0

renamed=''
for info in "$venv"/lib/python3*/site-packages/dantinox-[0-9]*.dist-info; do # the distribution is dantinox-lab now
    [ ! -d "$info" ] || renamed=yes
done
if [ -e "$marker" ]; then
    say "The last install was cut short; starting afresh."
    create
elif [ -n "$renamed" ]; then
    say "$venv holds an older DantinoX under another name; starting afresh."
    create
elif ! venv_runs || { ! have uv && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    create
fi
rm -f "$stamp"
: >"$marker"
install "$wanted"
warm_up
printf '%s\n' "$key" "$wanted" "$probe" "$gpu" >"$stamp.new"
mv "$stamp.new" "$stamp"
rm -f "$marker"
say "Ready."
