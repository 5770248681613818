"""Batches: they grow with the load, keep the order, and a request that would wait too long is refused."""

import asyncio
import gc
import threading
import weakref

import pytest
import torch

from holdfast.server.requests import Batcher, Refused


class Gated:
    """Answers a batch only after `gate` is set, and records the batches."""

    def __init__(self):
        self.gate, self.batches, self.entered = threading.Event(), [], threading.Event()

    def __call__(self, batch):
        self.entered.set()
        self.gate.wait(60)
        self.batches.append(list(batch))
        return [ValueError(str(x)) if x < 0 else x * 10 for x in batch]


def batcher(answer, **settings):
    return Batcher(answer, **{"max_rows": 4, "max_latency_s": 1.0, **settings})


def test_requests_that_arrive_during_a_batch_form_the_next_one():
    answer = Gated()

    async def main():
        queue = batcher(answer)
        first = asyncio.ensure_future(queue.submit(0, 1))
        await asyncio.to_thread(answer.entered.wait, 10)
        others = [
            asyncio.ensure_future(queue.submit(x, rows)) for x, rows in ((1, 2), (2, 2), (3, 1), (-4, 1))
        ]
        await asyncio.sleep(0)
        assert queue.waiting == 6
        answer.gate.set()
        results = await asyncio.gather(first, *others, return_exceptions=True)
        queue.close()
        return results

    results = asyncio.run(main())
    assert results[:4] == [0, 10, 20, 30] and str(results[4]) == "-4"
    assert answer.batches == [[0], [1, 2], [3, -4]]


def test_concurrent_clients_share_batches_and_a_client_alone_does_not_wait():
    batches = []

    def answer(batch):
        batches.append(list(batch))
        return batch

    async def main():
        queue = batcher(answer, gather_s=60.0)

        async def client(k, pause_s):
            for _ in range(3):
                await queue.submit(k, 1)
                await asyncio.sleep(pause_s)

        await asyncio.wait_for(client(7, 0.0), 30)
        alone = list(batches)
        batches.clear()
        # the second batch waits for the client that sends its next request later
        await asyncio.wait_for(asyncio.gather(client(0, 0.0), client(1, 0.02)), 30)
        queue.close()
        return alone

    assert asyncio.run(main()) == [[7]] * 3
    assert batches == [[0, 1]] * 3


def test_a_batch_waits_for_others_for_at_most_half_of_the_largest_latency():
    async def main():
        queue = batcher(lambda batch: batch, gather_s=60.0, max_latency_s=0.1)
        await asyncio.gather(queue.submit(0, 1), queue.submit(1, 1))
        await asyncio.wait_for(queue.submit(2, 1), 30)  # the other client does not send again
        queue.close()

    asyncio.run(main())


def test_one_cancelled_request_and_one_error_do_not_affect_the_others():
    answer = Gated()

    async def main():
        queue = batcher(answer)
        requests = [asyncio.ensure_future(queue.submit(x, 1)) for x in (1, -2, 3)]
        await asyncio.sleep(0)
        requests[0].cancel()
        answer.gate.set()
        results = await asyncio.gather(*requests, return_exceptions=True)
        queue.close()
        return results

    cancelled, failed, answered = asyncio.run(main())
    assert isinstance(cancelled, asyncio.CancelledError) and isinstance(failed, ValueError) and answered == 30


def test_refused_requests_do_not_wait_for_the_garbage_collector():
    async def main():
        queue, references = batcher(lambda batch: [Refused(422, "refused") for _ in batch]), []
        gc.disable()
        try:
            for _ in range(4):
                request = torch.zeros(1)
                references.append(weakref.ref(request))
                with pytest.raises(Refused):
                    await queue.submit(request, 1)
                del request
            queue.close()
            return sum(each() is not None for each in references)
        finally:
            gc.enable()

    assert asyncio.run(main()) <= 1  # that of the last batch


def test_an_error_of_a_whole_batch_reaches_its_requests_and_the_thread_continues():
    def answer(batch):
        if 0 in batch:
            raise RuntimeError("broken")
        return batch

    async def main():
        queue = batcher(answer)
        with pytest.raises(RuntimeError, match="broken"):
            await queue.submit(0, 1)
        assert await queue.submit(5, 1) == 5
        queue.close()
        with pytest.raises(Refused) as refused:
            await queue.submit(5, 1)
        assert refused.value.status == 503

    asyncio.run(main())


def test_batches_shrink_and_requests_are_refused_if_the_model_is_slow():
    answer = Gated()

    async def main():
        queue = batcher(answer, max_rows=64)
        queue._row_s = 0.1  # as measured before: a tenth of a second for each input
        assert queue.largest == 5
        waiting = [asyncio.ensure_future(queue.submit(x, 4)) for x in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Refused) as refused:
            await queue.submit(9, 1)
        assert refused.value.status == 503 and dict(refused.value.headers) == {"retry-after": "2"}
        answer.gate.set()
        assert await asyncio.gather(*waiting) == [0, 10, 20]
        queue.close()

    asyncio.run(main())


def test_requests_that_arrive_at_a_time_form_one_batch():
    answer = Gated()
    answer.gate.set()

    async def main():
        queue = batcher(answer)
        results = await asyncio.gather(*(queue.submit(x, 1) for x in (1, 2, 3)))
        queue.close()
        return results

    assert asyncio.run(main()) == [10, 20, 30] and answer.batches == [[1, 2, 3]]
