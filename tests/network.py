"""Programs that say where they connect to."""

import sys

SPY = """
import sys

def spy(event, args):
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    if host not in (None, "127.0.0.1", b"127.0.0.1", "localhost", "::1"):
        print("left the machine for", host, file=sys.stderr, flush=True)

sys.addaudithook(spy)
"""


def spied(program, *args):
    """The command that runs a program, which says so on stderr when it looks up or connects to other machines."""
    return [sys.executable, "-c", SPY + program, *map(str, args)]


def assert_stayed(said):
    """Holds a program to having asked no other machine, by what it said."""
    assert "left the machine" not in said, said
