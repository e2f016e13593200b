"""The weight flow from learner rank 0 to any number of generators that come and go.

`Publisher` serves a small TCPStore (the control plane, `control`) and broadcasts flat buckets of bytes over process
groups of its own (the data plane, `transport`); `Subscriber` receives and verifies them in the background. `roster`
decides who is served when. Tensors are laid out and fingerprinted in `layout`.

    with Publisher(host, device="cpu") as publisher:           # learner
        publisher.publish(version, named_weights(model))

    with Subscriber(*address, name="generator-1") as weights:  # generator
        if (update := weights.poll()) is not None:             # between two decode steps
            with update:
                load(update.tensors, update.version)
"""

from engine.weights.layout import fingerprint, fingerprints, weights_hash
from engine.weights.publisher import Publisher
from engine.weights.subscriber import Subscriber
from engine.weights.transport import Connect, GlooTransport, NcclTransport, Seat, Transport, TransportError
from engine.weights.update import Update

__all__ = [
    "Connect",
    "GlooTransport",
    "NcclTransport",
    "Publisher",
    "Seat",
    "Subscriber",
    "Transport",
    "TransportError",
    "Update",
    "fingerprint",
    "fingerprints",
    "weights_hash",
]
