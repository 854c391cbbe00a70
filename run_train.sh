#!/usr/bin/env bash
# Train on this machine: ./run_train.sh [--section.key=value ...]; ./run_train.sh --help says the rest.
# A shell's place is taken by lmoe/launch.py, which starts the ranks and passes signals on to them.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$(command -v python || command -v python3)}
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -P -m lmoe.launch "$@" </dev/null
