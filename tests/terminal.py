"""A process in a pseudo-terminal: what is typed, and what is shown."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import time


class Terminal:
    """A process in a pseudo-terminal of its own, which is killed with the context."""

    def __init__(self, command, **settings):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=own_terminal,
            **settings,
        )
        os.close(slave)
        self.shown, self.seen = "", 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def until(self, text, seconds=120, press=""):
        """Read until a text is shown, after the one that was waited for before.

        ``press`` is typed every 3 seconds until then: a ctrl-c that comes after a prompt is shown and before it is read from is
        lost, as in any program that reads with ``input``.
        """
        end, next_press = time.monotonic() + seconds, time.monotonic()
        while (found := self.shown.find(text, self.seen)) < 0:
            ready, _, _ = select.select([self.master], [], [], 1)
            assert time.monotonic() < end, f"{text!r} never came: {self.shown[-2000:]}"
            if press and time.monotonic() >= next_press:
                self.type(press)
                next_press = time.monotonic() + 3
            if ready:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
        self.seen = found + len(text)

    def type(self, text):
        os.write(self.master, text.encode())

    def end(self, seconds=60):
        """Wait until the process has ended; what it shows is read, so that it does not wait for a reader."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, self.shown[-2000:]
            ready, _, _ = select.select([self.master], [], [], 0.2)
            if ready:
                try:
                    self.shown += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    continue
        return self.process.returncode


def own_terminal():
    """Make the standard input the terminal that ctrl-c is typed at, and let ctrl-c arrive as a shell does.

    A process that was started in the background ignores it, and so would what it starts.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
