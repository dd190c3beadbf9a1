#!/usr/bin/env bash
# Checks and figures on a borrowed GPU or TPU, in at most 8 minutes: scripts/accelerator.sh DIR
#
# JSON files go into DIR as they are made, and a table for docs/performance.md into DIR/summary.md. Needs a python3 with
# jax, flax and the other packages of pyproject.toml; specjax itself need not be installed. PYTHON names another
# interpreter. --help lists the options.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
"$python" -P -c 'import importlib.util as u; assert all(map(u.find_spec, ["jax", "flax", "orbax.checkpoint"]))' \
  2>/dev/null || { echo "error: $python has no jax, flax or orbax-checkpoint; set PYTHON=/path/to/python3" >&2; exit 2; }
exec "$python" -P -m specjax.commands.accelerator "$@"
