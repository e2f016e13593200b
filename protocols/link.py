"""The link between workers and the buffer: one ROUTER, any number of DEALERs, and a protocol of our own above them.

ZeroMQ is only the pipe: what it may lose across a reconnect (with its heartbeats on: silently, so they stay off, and so
does its reconnecting) is covered here. Each direction is a stream of numbered messages that the sender keeps until the
receiver has confirmed them and sends anew, in order, after each new welcome:

- worker to buffer: the buffer acknowledges each id once what it says is durable, or refuses it with a reason;
- buffer to worker: the worker confirms all ids up to one as soon as they have arrived.

Each side drops ids that it has seen, so within the life of one buffer a message is delivered once, however often the
connection breaks. A buffer that was started anew remembers no ids: to it delivery is at least once, and the ledger
refuses the second time. Heartbeats, status requests, hellos and confirmations carry no id and are not sent anew.

Beyond this machine both ends need keys (`link_keys`): the connection is then encrypted, a stranger gets nothing, and a
worker says only what is its role's to say (`link_rights`).
"""

from protocols.link_client import Client
from protocols.link_errors import LinkError, LinkRefused, LinkTimeout
from protocols.link_keys import BufferKeys, KeysError, WorkerKeys
from protocols.link_server import Joined, Left, Received, Server

__all__ = [
    "BufferKeys", "Client", "Joined", "KeysError", "Left", "LinkError", "LinkRefused", "LinkTimeout", "Received", "Server",
    "WorkerKeys",
]  # fmt: skip
