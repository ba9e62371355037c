"""Places for images that come together, on a real event loop."""

import asyncio
import math

from hypothesis import strategies as st

from server.crowd import Crowd
from tests.examples import examples


class Images:
    """Each with a deadline, which it has one of few places by."""

    def __init__(self, most, clock=lambda: 0.0):
        self.crowd = Crowd(most, clock)
        self.inside, self.entered = [], []

    async def answer(self, deadline, until):
        async with self.crowd.place(deadline):
            self.inside.append(deadline)
            self.entered.append(deadline)
            try:
                await until.wait()
            finally:
                self.inside.remove(deadline)


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def test_what_finds_no_place_waits_the_most_urgent_first():
    async def story():
        images, done, later = Images(1), asyncio.Event(), asyncio.Event()
        later.set()
        first = asyncio.ensure_future(images.answer(0.0, done))
        await settle()
        others = [asyncio.ensure_future(images.answer(d, later)) for d in (0.03, 0.01, 0.02, 0.01)]
        await settle()
        assert images.entered == [0.0]
        done.set()
        await asyncio.gather(first, *others)
        assert images.entered == [0.0, 0.01, 0.01, 0.02, 0.03]

    asyncio.run(story())


def test_what_is_more_urgent_than_who_has_places_waits_for_none_of_them():
    async def story():
        images, done = Images(2), asyncio.Event()
        tasks = [
            asyncio.ensure_future(images.answer(d, done)) for d in (0.09, 0.09, 0.09, 0.01, 0.01)
        ]
        await settle()
        assert images.entered == [0.09, 0.09, 0.01], "half as many again"
        done.set()
        await asyncio.gather(*tasks)
        assert images.entered == [0.09, 0.09, 0.01, 0.01, 0.09]

    asyncio.run(story())


def test_an_image_without_a_deadline_is_urgent_once_it_has_waited():
    async def story():
        clock = [0.0]
        images, done, later = Images(1, lambda: clock[0]), asyncio.Event(), asyncio.Event()
        later.set()
        tasks = [asyncio.ensure_future(images.answer(0.0, done))]
        for clock[0], deadline in ((0.0, math.inf), (0.2, 1.2), (1.0, 2.0), (0.1, 0.2)):
            tasks.append(asyncio.ensure_future(images.answer(deadline, later)))
            await settle()
        done.set()
        await asyncio.gather(*tasks)
        assert images.entered == [0.0, 0.2, math.inf, 1.2, 2.0]

    asyncio.run(story())


@examples(
    100,
    1000,
    most=st.integers(1, 3),
    events=st.lists(st.tuples(st.sampled_from(["come", "end", "leave"]), st.integers(0, 9))),
)
def test_as_many_are_inside_as_may_be_whoever_leaves_when(most, events):
    async def story():
        images, tasks = Images(most), []
        for event, number in events:
            if event == "come":
                done = asyncio.Event()
                tasks.append((asyncio.ensure_future(images.answer(number, done)), done))
            elif tasks:
                task, done = tasks[number % len(tasks)]
                done.set() if event == "end" else task.cancel()
                if number % 2:
                    continue  # and more happens before the loop turns
            await settle()
            open_ones = sum(not task.done() for task, _ in tasks)
            assert min(most, open_ones) <= len(images.inside) <= min(most + most // 2, open_ones)
        for task, _ in tasks:
            task.cancel()
        await asyncio.gather(*(task for task, _ in tasks), return_exceptions=True)
        assert not images.inside and not images.crowd._inside and not images.crowd._waiting

    asyncio.run(story())
