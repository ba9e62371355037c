"""Messages between threads."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from server.inbox import Inbox


def waiting(inbox, workers):
    """Spin until so many workers wait."""
    until = time.monotonic() + 10
    while len(inbox._waiting) < workers:
        assert time.monotonic() < until
        time.sleep(1e-4)


def test_all_messages_are_taken_at_once_in_their_order():
    inbox = Inbox()
    messages = [lambda: None, None, lambda: None]
    for message in messages:
        inbox.put(message)
    inbox.wait(0, 60.0)
    assert inbox.take() == messages
    inbox.wait(0, 1e-3)
    assert inbox.take() == []


def test_of_those_that_wait_the_first_is_let_go_for_all_that_comes():
    inbox = Inbox()

    def take(worker):
        inbox.wait(worker, 60.0)
        return inbox.take()

    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(take, 1)
        waiting(inbox, 1)
        first = pool.submit(take, 0)
        waiting(inbox, 2)
        inbox.put(print)
        assert first.result(10)[0] is print
        assert not second.done()
        inbox.put(None)
        assert second.result(10) == [None]


def test_no_message_is_lost_or_taken_twice():
    inbox, taken, each = Inbox(), [], 500

    def work(worker):
        messages = []
        while None not in messages:
            inbox.wait(worker, 0.01)
            messages = inbox.take()
            taken.extend(m for m in messages if m)
        inbox.put(None)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()

    def send(sender):
        for number in range(each):
            inbox.put((sender, number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(send, range(4)))
    inbox.put(None)
    for worker in workers:
        worker.join(10)
    assert sorted(taken) == [(sender, number) for sender in range(4) for number in range(each)]
