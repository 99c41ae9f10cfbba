"""Seeds of parts of a run, such as ranks, that no other seed of a run shares."""

import hashlib


def mixed_seed(*parts: int | str) -> int:
    """A seed from several numbers and names, in [0, 2^63).

    A sum would give seed 0 of part 1 and seed 1 of part 0 the same random numbers.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
