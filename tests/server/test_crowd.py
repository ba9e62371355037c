"""Places for images that come together, on a real event loop."""

import asyncio

from hypothesis import strategies as st

from server.crowd import Crowd
from tests.examples import examples


class Images:
    """Each with a deadline, which it has one of few places by."""

    def __init__(self, most):
        self.crowd = Crowd(most)
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
        others = [asyncio.ensure_future(images.answer(d, later)) for d in (3.0, 1.0, 2.0, 1.0)]
        await settle()
        assert images.entered == [0.0]
        done.set()
        await asyncio.gather(first, *others)
        assert images.entered == [0.0, 1.0, 1.0, 2.0, 3.0]

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
            assert len(images.inside) == min(most, open_ones)
        for task, _ in tasks:
            task.cancel()
        await asyncio.gather(*(task for task, _ in tasks), return_exceptions=True)
        assert images.crowd._free == most

    asyncio.run(story())
