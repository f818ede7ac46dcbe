"""The stop of a run before its last update: signals ask for it, and all processes make it after the same update."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import jax

from lcm_jax.training import distributed


class Stopped(BaseException):
    """A stop that was asked for within `StopSignal.at_once`."""


class StopSignal:
    """SIGTERM, SIGHUP (its terminal was closed) and the first Ctrl-C ask for a clean stop; a second Ctrl-C interrupts
    as usual.

    A signal to one process of several is one to all of them. requested: the signal, or None.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self):
        self.requested, self._at_once = None, False
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup asks to go on without a terminal
        asked = [s for s in self.SIGNALS if s != signal.SIGHUP or not ignored]
        self._agreement = Agreement(self._hear)
        self._before = {s: signal.signal(s, self._handle) for s in asked}

    def _hear(self, number: int) -> None:
        """Take over another process's signal; called in a thread."""
        if self.requested is None:
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _handle(self, number, frame):
        self.requested = signal.Signals(number)
        self._agreement.ask(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._at_once:
            self._at_once = False
            raise Stopped

    def reached(self, step: int) -> bool:
        """Return True if the run is to stop after the update number `step`, in every process at the same one."""
        return self.requested is not None if jax.process_count() == 1 else self._agreement.reached(step)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Leave the block as soon as a stop is asked for: what it does can be done without."""
        self._at_once = True
        try:
            yield
        except Stopped:
            pass
        finally:
            self._at_once = False

    def close(self):
        self._agreement.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Agreement:
    """A stop that one process asks for and all make after the same update, without waiting for one another before.

    heard: called in a thread of each process with the signal that was asked with. After the question, these threads
    meet, and each tells the update that its process has come to. The last of these has a next one, which no process has
    passed and all come to: the one to stop after. Close it in every process.
    """

    def __init__(self, heard: Callable[[int], object]):
        self._name, self._heard = distributed.unique("stop"), heard
        self._lock, self._step, self._last = threading.Lock(), 0, None
        self._thread = threading.Thread(target=self._listen, daemon=True)
        if jax.process_count() > 1:
            self._thread.start()

    def ask(self, number: int) -> None:
        """Ask all processes to stop, because of a signal."""
        self._say(str(number))

    def reached(self, step: int) -> bool:
        """Return True in every process at the update to stop after. Call it with each update in turn.

        It costs less than a microsecond, and once, while the processes agree, some milliseconds.
        """
        with self._lock:
            self._step = step
            return self._last is not None and step >= self._last

    def close(self) -> None:
        """End the thread; the run is over in every process, or in this one by an error."""
        if jax.process_count() > 1:
            self._say("")
            self._thread.join()

    def _say(self, text: str) -> None:
        if jax.process_count() > 1:
            with suppress(jax.errors.JaxRuntimeError):  # another process was first
                distributed.client().key_value_set(self._name, text)

    def _listen(self) -> None:
        client = distributed.client()
        with suppress(jax.errors.JaxRuntimeError):  # the service has ended, and so will this process
            if not (number := client.blocking_key_value_get(self._name, distributed.WAIT_SECONDS * 10**5)):
                return
            with self._lock:
                client.key_value_set(f"{self._name}/{jax.process_index()}", str(self._step))
                client.wait_at_barrier(f"{self._name} of all", distributed.WAIT_SECONDS * 1000)
                self._last = 1 + max(int(step) for _, step in client.key_value_dir_get(f"{self._name}/"))
            self._heard(int(number))
