"""How many layers' receivers are contracted together on a GPU."""

from __future__ import annotations

RECEIVER_TILE = 256  # receivers of a tile of the contraction


def layers_together(each: int, most: int) -> int:
    """How many of up to `most` layers with so many receivers each fill the contraction's tiles best; the more of
    equals, which read the senders less often."""

    def filled(layers: int) -> tuple[float, int]:
        tiles = -(-layers * each // RECEIVER_TILE)
        return layers * each / max(1, tiles), layers

    return max(range(1, max(1, most) + 1), key=filled)
