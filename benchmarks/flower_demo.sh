#!/usr/bin/env bash
# The demo over Flower on one machine: a SuperLink with TLS and node authentication, four SuperNodes as four data holders
# with ledgers of their own, and the same run in one process for comparison. Noise is reproducible so that bits can be
# compared, which makes it no protection: a real site refuses such a run.
#
#   benchmarks/flower_demo.sh [FOLDER] [privfed overrides, such as -s data.limit=2000]
#
# PRIVFED (the command), PYTHON, PORT, SITES, PRESET and DEADLINE_S can be set in the environment.
set -euo pipefail
folder=${1:-runs/flower-demo}; shift || true
here=$(cd "$(dirname "$0")" && pwd)
privfed=${PRIVFED:-.venv/bin/privfed}; python=${PYTHON:-.venv/bin/python}
port=${PORT:-9092}; sites=${SITES:-4}; preset=${PRESET:-demo}; deadline=${DEADLINE_S:-600}
privfed=$(realpath -s "$privfed"); python=$(realpath -s "$python")
# five processes that each took every core would wait for one another
threads=$(($(nproc) / (sites + 1))); export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
mkdir -p "$folder"; cd "$folder"
"$privfed" config show "$preset" -s partition.clients="$sites" -s privacy.reproducible_noise=true \
  -s client.deadline_s="$deadline" "$@" > run.toml
model=$("$python" -c 'import tomllib; print(tomllib.load(open("run.toml", "rb"))["model"]["name"])')

running=()
stop() { for id in "${running[@]}"; do kill "$id" 2>/dev/null || true; done; wait; }
trap stop EXIT

for ((i = 0; i < sites; i++)); do
  cat > "site-$i.toml" <<EOF
name = "site-$i"
superlink = "127.0.0.1:$port"
roster = "roster.toml"
state = "site-$i"
root_certificates = "server/tls/ca.pem"
part = [$i, $sites]
[caps]
epsilon = 10.0
delta = 1e-5
[accept]
models = ["$model"]
min_cohort = 2
reproducible_noise = true # for this comparison only
EOF
  "$privfed" join "site-$i.toml" --card run.toml
done
cat site-*.card.toml > roster.toml

"$privfed" serve run.toml --roster roster.toml -o flower --state server --port "$port" & server=$!
running+=("$server")
until [ -f server/tls/server.pem ]; do sleep 0.5; kill -0 "$server"; done
for ((i = 0; i < sites; i++)); do
  "$privfed" join "site-$i.toml" > "site-$i.log" 2>&1 & running+=("$!")
done
wait "$server"
stop; running=()
"$privfed" train run.toml -o in-process

"$python" "$here/flower_lab.py" flower
"$python" - <<'EOF'
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def read(folder, kind):
    found = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


one, two = (load_file(Path(f, "checkpoint", "state.safetensors"))["params"] for f in ("flower", "in-process"))
score = [read(f, "eval")[-1][read(f, "eval")[-1]["metric"]] for f in ("flower", "in-process")]
print(f"\ntest score over Flower {score[0]:.4f}, in one process {score[1]:.4f}; same bits: {np.array_equal(one, two)}")
for site in sorted(Path(".").glob("site-?/ledger.sqlite")):
    print(f"{site}: {site.stat().st_size} bytes")
EOF
for ((i = 0; i < sites; i++)); do "$privfed" ledger "site-$i/ledger.sqlite" --verify | tail -3; done
