"""The link between workers and the buffer: one ROUTER, any number of DEALERs, and a protocol of our own above them.

ZeroMQ is only the pipe. What it may lose across a reconnect (with its heartbeats on: silently, so they stay off) is
covered here: a client keeps every message until the buffer acknowledges its id and sends all of them anew, in order,
after each new welcome. Delivery is at least once and the ledger refuses the second time.
"""

from protocols.link_client import Client
from protocols.link_errors import LinkError, LinkRefused, LinkTimeout
from protocols.link_server import Joined, Left, Received, Server

__all__ = ["Client", "Joined", "Left", "LinkError", "LinkRefused", "LinkTimeout", "Received", "Server"]
