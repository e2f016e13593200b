"""The weight flow from the learner's ranks to any number of generators that come and go.

`Publisher` serves a small TCPStore (the control plane, `control`) and broadcasts flat buckets of bytes over process
groups of its own (the data plane, `transport`); `Subscriber` receives and verifies them in the background. `roster`
decides who is served when. Tensors are laid out and fingerprinted in `layout`. Of several ranks each keeps a share of the
weights aside and sends that (`share`): the first has the `Publisher`, the others a `Keeper` each.

    with Publisher(host, Terms()) as publisher:                 # learner
        publisher.publish(version, named_weights(model))

    with Subscriber(*address, name="generator-1") as weights:  # generator
        if (update := weights.poll()) is not None:             # between two decode steps
            with update:
                load(update.tensors, update.version)
"""

from engine.weights.keeper import Keeper
from engine.weights.layout import fingerprint, fingerprints, weights_hash
from engine.weights.publisher import Publisher
from engine.weights.subscriber import Subscriber
from engine.weights.terms import Terms
from engine.weights.transport import Connect, GlooTransport, NcclTransport, Seat, Transport, TransportError
from engine.weights.update import Update

__all__ = [
    "Connect",
    "GlooTransport",
    "Keeper",
    "NcclTransport",
    "Publisher",
    "Seat",
    "Subscriber",
    "Terms",
    "Transport",
    "TransportError",
    "Update",
    "fingerprint",
    "fingerprints",
    "weights_hash",
]
