"""The words of the status page that are not counters: who is connected."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.serving import page

UIDS = st.sampled_from([0, 1, 1000, 65534, (1 << 32) - 2])


def words() -> memoryview:
    return memoryview(bytearray(page.PAGE_SIZE)).cast("Q")


@given(st.lists(UIDS))
def test_every_users_connections_are_counted_as_they_come_and_go(uids: list[int]) -> None:
    found = words()
    open_now: Counter[int] = Counter()
    for index, uid in enumerate(uids):
        change = -1 if index % 3 == 2 and open_now[uid] else 1
        page.count_user(found, uid, change)
        open_now[uid] += change
        for each in set(uids):
            assert page.connections_of(found, each) == open_now[each]


def test_users_beyond_the_table_are_not_counted_and_take_places_that_come_free() -> None:
    found = words()
    for uid in range(page.USERS_MAX + 2):
        page.count_user(found, uid, 1)
    last = page.USERS_MAX + 1
    assert page.connections_of(found, last) == 0
    page.count_user(found, last, -1)  # one of those that nobody counted ends
    page.count_user(found, 5, -1)
    page.count_user(found, last, 1)
    assert page.connections_of(found, last) == 1
    assert page.connections_of(found, 5) == 0
    assert all(page.connections_of(found, uid) == 1 for uid in range(page.USERS_MAX) if uid != 5)


def test_the_table_is_no_counter() -> None:
    """What a worker that ended had open is not added to its successor's."""
    mine, theirs = words(), words()
    page.count_user(theirs, 7, 1)
    page.add(mine, theirs)
    assert page.connections_of(mine, 7) == 0
