from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_stream.sdk.items import Ids, Piece, Texts
from sglang_stream.sdk.outbox import GATHERED_CHARACTERS, AppendOutbox, Call, UpdateOutbox

pieces = st.one_of(
    st.text(max_size=3).map(lambda t: Texts([t])),
    st.lists(st.integers(0, 9), max_size=3).map(Ids),
)


def flat(parts: list[Piece]) -> list[object]:
    return [x for p in parts for x in (p.items if isinstance(p, Texts) else p.ids)]


@given(st.lists(st.one_of(pieces, st.just("take"), st.integers(1, 5))))
def test_an_append_outbox_keeps_order_and_numbers(steps: list[object]) -> None:
    """Pieces are added, calls taken, and now and then the server asks for an earlier number."""
    outbox, added, applied, server = AppendOutbox(), [], 0, []
    for step in [*steps, *["take"] * 50]:
        if step == "take":
            call = outbox.take()
            if call is not None:
                assert call.seq == applied + 1
                applied, server = call.seq, [*server[: call.seq - 1], call]
        elif isinstance(step, int):
            if step <= applied:
                applied = step - 1
                outbox.rewind(step)
        else:
            added.append(step)
            outbox.add(step)
    assert flat([call.piece for call in server]) == flat(added) == flat(outbox.pieces())
    assert [call.seq for call in server] == list(range(1, outbox.last_seq + 1))


def test_calls_are_gathered_by_kind_and_size() -> None:
    outbox = AppendOutbox()
    big = "x" * (GATHERED_CHARACTERS - 1)
    for piece in (Texts(["a"]), Texts(["b"]), Ids([1]), Ids([2]), Texts([big]), Texts(["cd"])):
        outbox.add(piece)
    calls = [outbox.take() for _ in range(5)]
    assert calls == [
        Call(1, Texts(["a", "b"])),
        Call(2, Ids([1, 2])),
        Call(3, Texts([big])),
        Call(4, Texts(["cd"])),
        None,
    ]
    assert calls[1] is not None
    assert calls[1].body("chunks") == {"seq": 2, "input_ids": [1, 2]}


def test_a_call_taken_again_is_the_same() -> None:
    outbox = AppendOutbox()
    outbox.add(Texts(["a"]))
    first = outbox.take()
    outbox.add(Texts(["b"]))
    outbox.rewind(1)
    assert outbox.take() is first
    assert outbox.take() == Call(2, Texts(["b"]))


def test_an_update_outbox_sends_the_newest_only() -> None:
    outbox = UpdateOutbox()
    assert outbox.take() is None
    assert outbox.last_seq == 0
    for text in "abc":
        outbox.add(Texts([text]))
    assert outbox.take() == Call(1, Texts(["c"]))
    assert outbox.take() is None
    outbox.rewind(1)
    assert outbox.take() == Call(1, Texts(["c"]))
    outbox.add(Texts(["d"]))
    outbox.rewind(1)
    assert outbox.take() == Call(2, Texts(["d"]))
    assert outbox.take() is None
    assert outbox.pieces() == [Texts(["d"])]


def test_an_update_outbox_without_lists_has_nothing_to_repeat() -> None:
    outbox = UpdateOutbox()
    outbox.rewind(1)
    assert outbox.take() is None
    assert outbox.pieces() == []
