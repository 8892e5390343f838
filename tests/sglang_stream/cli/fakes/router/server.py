"""Stands in for the router: serves its readiness at the configured port, or tells its settings."""

import msgspec
import service


def run(config):
    if any(worker.url == "http://tell-your-settings" for worker in config.workers):
        print(msgspec.json.encode(config).decode(), flush=True)
    else:
        service.run(config.port, [])
