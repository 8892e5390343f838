#!/usr/bin/env bash
# Start and calibrate: OUT/gpu.json and its samples.
. "$(dirname "$0")/common.sh"
# shellcheck disable=SC2086  # the flags are several words
timeout 480 python3 -m sglang_stream.cli calibrate --model-path "$model" --out "$out/gpu.json" \
  --max-tokens 16384 --repeats 3 --host-memory-gb 16 $flags
