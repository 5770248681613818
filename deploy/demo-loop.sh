#!/bin/sh
# Serve the bundled model, attack it, let holdfast adapt harden and replace it, and attack it again, in about five minutes.
# Usage: demo-loop.sh FOLDER; the variables PORT and ADMIN_PORT change the ports 8080 and 8081, and BUDGET the time of
# the training.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=$1
port=${PORT:-8080}
admin=${ADMIN_PORT:-8081}
budget=${BUDGET:-60s}
mkdir -p "$folder"
cd "$folder"
rm -rf guard* keys.json* audit flagged-inputs adapt ./*.key ./*.npz ./*.log before.* after.*
cp "$here/demo-loop-guard.yaml" guard.yaml

# The model is a file, which adapt replaces. Its images are the bundled ones: half of the test images are the reference
# of the monitor, and the others are sent as benign requests.
python3 - <<'PY'
import shutil
from pathlib import Path

import numpy as np

import holdfast

bundled = Path(holdfast.__file__).parent / "bundled"
shutil.copyfile(bundled / "mnist-cnn.safetensors", "model.safetensors")
digits = np.load(bundled / "mnist-mini.npz")
order = np.random.default_rng(0).permutation(len(digits["x_test"]))
for name, rows in (("reference", order[:500]), ("benign", order[500:])):
    np.savez(f"{name}.npz", x=digits["x_test"][rows], y=digits["y_test"][rows])
PY

echo '1. Calibrate the guard, and start the server with a monitor.'
holdfast calibrate model.safetensors reference.npz --guard guard.yaml --quiet
umask 077  # holdfast refuses keys that other users can read
for name in benign attacker; do
  holdfast keys add $name --scope infer --expires 1d --file keys.json --quiet > $name.key
done
holdfast keys add adapt --scope adapt --expires 1d --file keys.json --quiet > adapt.key
holdfast keys add operator --scope admin --expires 1d --file keys.json --quiet > operator.key
url=http://127.0.0.1:$port/v2/models/model
holdfast serve model.safetensors --guard guard.yaml --keys keys.json --audit audit --monitor reference.npz --workers 2 \
  --port "$port" --admin-port "$admin" > serve.log 2>&1 &
server=$!
stop() {
  kill $requests $adapting 2> adapt-end.log || true
  kill $server 2> adapt-end.log || true
  wait $server || true
}
requests='' adapting=''
trap stop EXIT
for _ in $(seq 120); do
  grep -q '^metrics' serve.log && break
  kill -0 $server || { cat serve.log; exit 1; }
  sleep 0.5
done
grep -q '^metrics' serve.log || { cat serve.log; exit 1; }

echo '2. Send benign requests, and wait for an alarm (holdfast adapt).'
python3 "$here/demo_requests.py" "$url/infer" "$(cat benign.key)" benign.npz > requests.log 2>&1 &
requests=$!
holdfast adapt "http://127.0.0.1:$admin" --key-file adapt.key --data mnist-mini --threat linf:0.2 --budget "$budget" \
  --assess-budget 20s --gate 'regression <= -0.3 vs baseline' --gate 'clean_accuracy_drop <= 0.05 vs baseline' \
  --canary-time 15s --run adapt > adapt.log 2>&1 &
adapting=$!

attack() {
  KEY="Bearer $(cat attacker.key)" holdfast assess "$url" mnist-mini -n 20 --threat linf:0.2,queries=200 \
    --allow-host "127.0.0.1:$port" --header 'Authorization: env:KEY' --suite black-box --quiet -o "$1.html" -o "$1.json" || true
}

echo '3. Attack the server with Square, which sees only scores.'
attack before

echo '4. The monitor raises an alarm. A candidate is trained, judged by the gates, tried as a canary, and promoted.'
echo "   Watch it: http://127.0.0.1:$admin/ui with the key in $folder/operator.key"
code=0
wait $adapting || code=$?
adapting=''
cat adapt.log
[ $code -le 1 ] || exit $code  # 1: the candidate was not promoted

echo '5. Attack the server again.'
attack after
kill $requests
wait $requests || true
requests=''
tail -n 1 requests.log

python3 - <<'PY'
import json

for name in ("before", "after"):
    accuracy = json.load(open(f"{name}.json"))["metrics"]["robust_accuracy"]["value"]
    print(f"{name} the adaptation, {100 * accuracy:.0f} % of 20 images survive the attack")
PY
holdfast verify audit
