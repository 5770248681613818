#!/bin/sh
# Serve the bundled model with a guard, keys and an audit chain, and print the command that attacks it.
# Usage: demo-serve.sh FOLDER; the variables PORT and ADMIN_PORT change the ports 8080 and 8081.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=$1
port=${PORT:-8080}
admin=${ADMIN_PORT:-8081}
mkdir -p "$folder"
cd "$folder"
rm -rf guard* keys.json* audit
cp "$here/demo-guard.yaml" guard.yaml

echo 'Calibrating the guard on 1,000 bundled images.'
holdfast calibrate mnist-cnn mnist-mini --guard guard.yaml --quiet
attacker=$(holdfast keys add attacker --scope infer --expires 1d --file keys.json --quiet)
metrics=$(holdfast keys add prometheus --scope metrics --expires 1d --file keys.json --quiet)

cat <<EOF

Attack the server from another terminal, in about a minute:

  export KEY='Bearer $attacker'
  holdfast assess http://127.0.0.1:$port/v2/models/mnist-cnn mnist-mini -n 10 --threat linf:0.2,queries=200 \\
    --allow-host 127.0.0.1:$port --header 'Authorization: env:KEY' --suite black-box -o $folder/report.html

Then look at what the guard did:

  curl -s -H 'Authorization: Bearer $metrics' http://127.0.0.1:$admin/metrics | grep -E '^holdfast_(decisions|rule_fired)_total.* [1-9]'
  holdfast verify $folder/audit
  grep -c '"action":"flag"' $folder/audit/*worker*.jsonl

Ctrl-C ends the server.

EOF
exec holdfast serve mnist-cnn --guard guard.yaml --keys keys.json --audit audit --port "$port" --admin-port "$admin"
