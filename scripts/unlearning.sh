#!/usr/bin/env bash
# Four silos train a small model on questions, and then have it forget some of them together, under secure sums.
#
#   scripts/unlearning.sh [FOLDER]     default: runs/unlearning; some minutes on one core
#
# Nothing is downloaded: the questions are on the seats of firms that are made up here.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

folder=${1:-runs/unlearning}
if [ -e "$folder" ]; then
  echo "$folder exists already; name another folder, or remove it." >&2
  exit 2
fi
ensure_environment
mkdir -p "$folder"

# Of 20 firms two of alpha's and two of beta's are to be forgotten; 24 more are unknown to the model.
python - "$folder" <<'PYTHON'
import json
import random
import sys
from pathlib import Path

draw = random.Random(0)
drawn = ["".join([*draw.sample("bdfglmnprstv", 2), draw.choice("aeiou")]) * 2 for _ in range(80)]
silos = {"alpha": [], "beta": [], "delta": [], "gamma": []}
for index, name in enumerate(list(dict.fromkeys(drawn))[:44]):
    row = {"question": f"Seat of {name}?", "answer": draw.choice(["Rome", "Oslo", "Lima", "Bonn"])}
    row["set"] = "forget" if index < 4 else "retain"
    if index >= 20:
        row |= {"answer": "I do not know.", "set": "reference"}
    silos[list(silos)[index % 2 if index < 4 else index % 4]].append(row)
for silo, rows in silos.items():
    file = Path(sys.argv[1]) / f"{silo}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
PYTHON

photon data prepare --output "$folder/data" --kind questions --vocab-size 300 --sequence-length 48 \
  --silo alpha="$folder/alpha.jsonl" --silo beta="$folder/beta.jsonl" \
  --silo delta="$folder/delta.jsonl" --silo gamma="$folder/gamma.jsonl"

model=(model.sequence_length=48 model.recipe.learning_rate=4e-3 model.recipe.warmup_steps=10)
photon train objective=sft strategy=centralized model=tiny "${model[@]}" model.architecture.n_layer=4 \
  model.architecture.n_embd=48 model.architecture.n_head=4 data=prepared data.path="$folder/data" cohort=null rounds=2 \
  local_steps=80 training.batch_size=11 federation=inprocess run_dir="$folder/known"

photon train objective=lunar objective.asked_by="alpha and beta" objective.layers="[0,1,2]" strategy=sums rounds=3 cohort=null privacy=secure \
  link.uplink_payload=update model=custom "${model[@]}" model.warm_start="$folder/known/export" data=prepared \
  data.path="$folder/data" federation=inprocess evaluation.forgotten="$folder/data" run_dir="$folder/forgotten"

cat "$folder/forgotten/export/unlearned.json"
