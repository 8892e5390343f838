from types import SimpleNamespace

import zmq

from sglang_stream.config import EngineConfig
from sglang_stream.engine.plugin import StreamPlugin


def test_news_of_a_transfer_ends_a_rest_and_only_one() -> None:
    plugin = StreamPlugin(EngineConfig())
    poller = zmq.Poller()
    scheduler = SimpleNamespace(
        idle_sleeper=SimpleNamespace(poller=poller), is_fully_idle=lambda: False
    )
    plugin._wake_on_events(None, scheduler)
    assert not poller.poll(0)
    for _ in range(2):
        plugin._wake_on_kv(None)
    assert poller.poll(0)
    plugin._idle(lambda _: None, scheduler)
    assert not poller.poll(0)


def test_a_scheduler_that_never_sleeps_is_not_woken() -> None:
    plugin = StreamPlugin(EngineConfig())
    scheduler = SimpleNamespace(idle_sleeper=None, is_fully_idle=lambda: True)
    plugin._wake_on_events(None, scheduler)
    plugin._wake_on_kv(None)
    idled: list[object] = []
    plugin._idle(idled.append, scheduler)
    assert idled == [scheduler]
