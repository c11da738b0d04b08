"""What one connection may take: time to send its request, room among the others. HTTP itself is uvicorn's; this only ends connections that wait for nothing."""

from typing import Any

WAIT = 30.0  # seconds in which a request's head must have come, after the connection or the last answer; bodies have their own (app.py)
READ = 60.0  # seconds in which a client must have taken something of an answer that waits for it


def bounded(protocol: type, most: int) -> type:
    """Connections of uvicorn's class `protocol` that do not wait for ever.

    Who opens connections and sends nothing, a byte now and then, or the beginning of a body, keeps nobody else out: when there are more than `most`, the one that
    has waited longest without a whole request is ended for the newest. One with a request in hand is never ended for another.

    Args:
      protocol: `uvicorn.protocols.http.h11_impl.H11Protocol`.
      most: connections; fewer than uvicorn's `limit_concurrency`, above which it answers 503.
    """
    import h11

    waiting: dict[Any, None] = {}  # connections without a whole request, the oldest first

    class Bounded(protocol):
        _head, _reader = None, None  # timers

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most and waiting:
                oldest = next(iter(waiting))
                del waiting[oldest]
                oldest.transport.abort()
            self._look()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._look()

        def send_400_response(self, message: str) -> None:
            # A request may go wrong while it is being answered, or after: a trace in the log for each would be the client's to order.
            if self.cycle is not None:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            try:
                super().send_400_response(message)
            except h11.LocalProtocolError:
                self.transport.abort()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._look()

        def connection_lost(self, error: Exception | None) -> None:
            super().connection_lost(error)
            waiting.pop(self, None)
            self._head, self._reader = _cancel(self._head), _cancel(self._reader)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reader = self._reader or self.loop.call_later(READ, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._reader = _cancel(self._reader)

        def _look(self) -> None:
            """Notes whether a request is in hand, and how long may be waited for one."""
            asked = self.cycle is not None and not self.cycle.response_complete
            if self.transport.is_closing():
                return
            if asked and not self.cycle.more_body:
                waiting.pop(self, None)
            else:
                waiting.setdefault(self)
            if asked:
                self._head = _cancel(self._head)
            else:
                self._head = self._head or self.loop.call_later(WAIT, self.transport.abort)

    return Bounded


def _cancel(timer: Any) -> None:
    if timer is not None:
        timer.cancel()
