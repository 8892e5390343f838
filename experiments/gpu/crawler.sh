#!/usr/bin/env bash
# The crawler-like load of crawler.toml: OUT/crawler.jsonl.
. "$(dirname "$0")/common.sh"
profile=$out/gpu.json
[ ! -e "$profile" ] || flags="$flags --profile $profile"
timeout 480 python3 -m sglang_stream.cli replay "$here/crawler.toml" --out "$out/crawler.jsonl" --events \
  --model-path "$model" --sglang-flags "$flags"
