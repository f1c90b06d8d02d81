"""The peers a workload can name: one line each. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

_SIZED = re.compile(r"(.+?)(\d+)")


class Needs(Enum):
    """What a peer needs that b2batch does not bring along."""

    NOTHING = "nothing"
    VLLM = "an interpreter with vllm (--vllm-python)"
    LLAMA_CPP = "xllamacpp and a GGUF file (--gguf)"


@dataclass(frozen=True, slots=True)
class PeerKind:
    """Where a peer's code is, what it needs, and the size that its name leaves out.

    ``warms_itself``: it loads the model when it gets its rows, and warms it up there.
    """

    module: str
    needs: Needs = Needs.NOTHING
    default_size: int = 0
    warms_itself: bool = False


PEERS: dict[str, PeerKind] = {
    "engine": PeerKind("b2batch.bench.peer_engine"),
    "engine-no-prefix": PeerKind("b2batch.bench.peer_engine"),
    "engine-no-cascade": PeerKind("b2batch.bench.peer_engine"),
    "engine-int8": PeerKind("b2batch.bench.peer_engine"),
    "loop": PeerKind("b2batch.bench.peer_transformers", default_size=1),
    "static": PeerKind("b2batch.bench.peer_transformers", default_size=16),
    "sorted": PeerKind("b2batch.bench.peer_transformers", default_size=16),
    "hf-continuous": PeerKind("b2batch.bench.peer_continuous", default_size=16),
    "ray-data": PeerKind("b2batch.bench.peer_ray", default_size=32, warms_itself=True),
    "vllm": PeerKind("b2batch.bench.peer_vllm", Needs.VLLM),
    "vllm-no-prefix": PeerKind("b2batch.bench.peer_vllm", Needs.VLLM),
    "llamacpp": PeerKind("b2batch.bench.peer_llamacpp", Needs.LLAMA_CPP, default_size=8),
    "score-engine": PeerKind("b2batch.bench.peer_engine"),
    "score-loop": PeerKind("b2batch.bench.peer_score", default_size=8),
    "score-vllm": PeerKind("b2batch.bench.peer_vllm", Needs.VLLM),
}


def split_name(name: str) -> tuple[str, int]:
    """``static16`` → (``static``, 16); the kind's own size where the name has none.

    Raises:
        ValueError: there is no such peer, or it takes no size.
    """
    if name in PEERS:
        return name, PEERS[name].default_size
    match = _SIZED.fullmatch(name)
    if match is None or match[1] not in PEERS or not PEERS[match[1]].default_size or not int(match[2]):
        raise ValueError(f"unknown peer {name!r}; one of {', '.join(PEERS)}, some with a batch size behind")
    return match[1], int(match[2])
