"""Stands in for SGLang's server: says how it was started and behaves as its flags tell it."""

import json
import os
import sys

import service

print(json.dumps({"argv": sys.argv[1:], "SGLANG_STREAM": os.environ["SGLANG_STREAM"]}), flush=True)
if "--port" in sys.argv:
    service.run(int(sys.argv[sys.argv.index("--port") + 1]), sys.argv)
