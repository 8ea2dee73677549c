#!/usr/bin/env bash
# From nothing to a report in about ten minutes on two CPU cores: makes .venv, trains a small model on real
# captioned pictures, draws, measures and reports. Started again, it reuses everything that is there.
# Words after the name are settings of mmtrain: launch/quickstart.sh train.steps=800 name=longer
set -euo pipefail

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
started=$SECONDS
# shellcheck source=launch/environment.sh
source "$launch/environment.sh"
cd "$mmtrain_root"

settings=(experiment=quickstart)
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "apt-get is missing here, so the stamps pictures cannot be fetched: going on with corpus=shapes."
    settings+=(corpus=shapes)
fi
settings+=("$@")

step() {
    echo
    echo "== [$(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s] mmtrain $*"
    mmtrain "$@"
}

config=$(mmtrain train --cfg job "${settings[@]}")
setting() { sed -n "s/^$1: //p" <<<"$config" | tr -d "\"'"; }
run=$(setting root)/$(setting name)

step doctor "${settings[@]}"
step train "${settings[@]}"
step generate "run=$run"
step evaluate "run=$run" task=loss
step report "run=$run"

elapsed=$((SECONDS - started))
folder=$(cd "$run" && pwd)
cat <<END

Done in $((elapsed / 60)) min $((elapsed % 60)) s: a model was trained, drew pictures, was measured and described.
  report        $folder/report.html   (open it in a browser)
  pictures      $folder/samples
  checkpoints   $folder/checkpoints
  numbers       $folder/metrics.jsonl, $folder/ledger.json
Next:
  source ${VIRTUAL_ENV}/bin/activate
  mmtrain generate 'generate.prompts=[a red apple]' run=$run
  mmtrain train experiment=quickstart corpus=pairs corpus.path=FOLDER name=mine     (your own pictures)
END
