"""A pseudo-terminal, and what arrives at its other end."""

import os
import threading
from contextlib import contextmanager


@contextmanager
def terminal():
    """A pseudo-terminal to write to, and a list that holds what arrived once the context is left."""
    master, slave = os.openpty()
    chunks = []

    def drain():
        try:
            while chunk := os.read(master, 65536):
                chunks.append(chunk)
        except OSError:  # how Linux says that the other end is closed
            pass

    reader = threading.Thread(target=drain)
    reader.start()
    with open(slave, "w", encoding="utf-8") as stream:
        yield stream, chunks
    reader.join()
    os.close(master)
