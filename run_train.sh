#!/usr/bin/env bash
# Train on this machine: ./run_train.sh [--section.key=value ...]; ./run_train.sh --help says the rest.
# lmoe/launch.py takes this shell's place, starts the ranks and passes signals on to them.
trap "exit 130" INT
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$(command -v python || command -v python3)}
hold=(env --block-signal=INT) # until it can hear a Ctrl-C; where env is GNU's
"${hold[@]}" true 2>/dev/null || hold=()
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
safe=(-P) # not from the folder where this is called; Python 3.10 does not know it
"$python" "${safe[@]}" -c "" 2>/dev/null || safe=()
exec "${hold[@]}" "$python" "${safe[@]}" -m lmoe.launch "$@" </dev/null
