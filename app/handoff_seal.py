"""Shows decode that a transfer descriptor is the one that prefill has made for this prompt.

A descriptor goes through the object store and other processes.  If it came changed, or another one in its place, decode
would read KV of other prompts, and no engine would notice.  So prefill adds a digest of the prompt and one of the whole
descriptor, and decode compares both.  They find mistakes; they do not withstand an attacker.
"""

from __future__ import annotations

import logging
import pickle
from hashlib import blake2b
from typing import Any

import msgspec

from app.messages import GenerateRequest, TransferDescriptor

logger = logging.getLogger("baton.handoff")


def seal(descriptor: TransferDescriptor, request: GenerateRequest) -> TransferDescriptor:
    """Return the descriptor with its digests.  `request` is the one that prefill got."""
    named = msgspec.structs.replace(descriptor, prompt_digest=_prompt_digest(request))
    return msgspec.structs.replace(named, seal=_digest_of(named))


def pack(descriptor: TransferDescriptor) -> bytes:
    """Return the descriptor as a message.

    Ray reads the answer of a call in the process of its caller too, a frontend, which is not to read descriptors.
    """
    return pickle.dumps(descriptor)


def unpack(message: Any) -> Any:
    """Return the descriptor in a message, or the message itself if it holds none, for `damage` to say so."""
    if not isinstance(message, bytes):
        return message
    try:
        return pickle.loads(message)
    except Exception:
        logger.exception("a message cannot be read as a transfer descriptor")
        return message


def damage(descriptor: Any) -> str:
    """Return why what came is not as prefill sealed it; empty if it is."""
    if not isinstance(descriptor, TransferDescriptor):
        return f"no transfer descriptor came, but {type(descriptor).__name__}"
    if descriptor.seal != _digest_of(descriptor):
        return "the transfer descriptor has changed on its way"
    return ""


def misplacement(descriptor: TransferDescriptor, request: GenerateRequest) -> str:
    """Return why an undamaged descriptor is not that of `request`, as decode got it; empty if it is.

    On prefill each attempt has an id of its own (app/frontend/attempt.py).
    """
    attempt = descriptor.request_id.removeprefix(request.request_id)
    is_of_request = descriptor.request_id.startswith(request.request_id) and (not attempt or attempt.startswith("-"))
    if not is_of_request or descriptor.prompt_digest != _prompt_digest(request):
        return f"the transfer descriptor is of another request or prompt: {descriptor.request_id}"
    return ""


def _prompt_digest(request: GenerateRequest) -> bytes:
    # In the control run of `baton verify` prefill computes another prompt on purpose.
    prompt = [] if request.prefill_mode == "corrupted" else request.prompt_token_ids
    return _digest((prompt, request.cache_salt))


def _digest_of(descriptor: TransferDescriptor) -> bytes:
    return _digest(msgspec.structs.replace(descriptor, seal=b"", phases={}))


def _digest(content: Any) -> bytes:
    return blake2b(msgspec.msgpack.encode(content, enc_hook=repr), digest_size=16).digest()
