"""A small service: `python service.py PORT [WORD...]`, healthy on any path unless told otherwise.

die         prints 30 lines and ends with status 3, at once
die-later   the same on GET /die, once healthy
unhealthy   answers 503 for ever
stubborn    ignores SIGTERM
family      has a child and a grandchild process that ignore SIGTERM
"""

import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CHILD = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] == "child":
    subprocess.Popen([sys.executable, "-c", sys.argv[2], "grandchild", ""])
print("up", flush=True)
time.sleep(600)
"""


def die():
    for i in range(30):
        print(f"log line {i}")
    sys.stdout.flush()
    os._exit(3)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            die()
        self.send_response(503 if "unhealthy" in sys.argv else 200)
        self.end_headers()

    def log_message(self, format, *args):
        pass


def run(port, words):
    if "die" in words:
        die()
    if "stubborn" in words:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "family" in words:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, "child", CHILD], stdout=subprocess.PIPE
        )
        for _ in range(2):
            child.stdout.readline()
    print("service", port, "is up", flush=True)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2:])
