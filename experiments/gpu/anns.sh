#!/usr/bin/env bash
# The anns-like load of anns.toml: OUT/anns.jsonl.
. "$(dirname "$0")/common.sh"
profile=$out/gpu.json
[ ! -e "$profile" ] || flags="$flags --profile $profile"
timeout 480 python3 -m sglang_stream.cli replay "$here/anns.toml" --out "$out/anns.jsonl" --events \
  --model-path "$model" --sglang-flags "$flags"
