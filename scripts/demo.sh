#!/usr/bin/env bash
# The main job in one command: six methods at three budgets look for needles with the embedded model, on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh cpu
folder="${1:-results/demo}"
echo "== needle in a haystack: six methods, three budgets; rows go to $folder, and a killed run goes on from there"
.venv/bin/run_needle_in_haystack.py \
  --method fullkv,streamingllm,h2o,snapkv,pyramidkv,adakv \
  --max_capacity_prompts 64,128,256 \
  --context_lengths 512,1024 --depths 10,30,50,70,90 --samples 4 --digits 4 \
  --save_dir "$folder"
.venv/bin/kvfactory report "$folder" -o "$folder/report.html"
