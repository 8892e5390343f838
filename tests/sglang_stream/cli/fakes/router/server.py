"""Stands in for the router: serves its readiness at the configured port."""

import service


def run(config):
    service.run(config.port, [])
