"""
Ed25519 verification (RFC 8032) without any dependency: Python's standard library has none, a device may have no other.

Strict, so that a signature has one spelling only: s < L, canonical encodings of A and R, neither of small order.
It handles public data only, so it need not run in constant time. 2 ms on a PC [measured].
"""

import hashlib
from typing import Optional, Tuple

Point = Tuple[int, int, int, int]  # extended coordinates: x = X/Z, y = Y/Z, x*y = T/Z

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
ROOT_OF_MINUS_ONE = pow(2, (P - 1) // 4, P)
IDENTITY = (0, 1, 1, 0)  # type: Point


def verify(public, signature, message):
    # type: (bytes, bytes, bytes) -> bool
    """Whether `signature` is `public`'s signature of `message`. Malformed input is False, never an exception."""
    if len(public) != 32 or len(signature) != 64:
        return False
    a = _decode(public)
    s = int.from_bytes(signature[32:], "little")
    if a is None or _small(a) or s >= L:
        return False
    h = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % L
    r = _combine(s, BASE, h, _negative(a))  # R = sB - hA
    # Comparing bytes instead of points refuses every non-canonical encoding of R as well.
    return not _small(r) and _encode(r) == signature[:32]


def valid(public):
    # type: (bytes) -> bool
    """Whether these 32 bytes can be a key at all: a canonical point that is not of small order."""
    point = _decode(public) if len(public) == 32 else None
    return point is not None and not _small(point)


def _add(p, q):
    # type: (Point, Point) -> Point
    a = (p[1] - p[0]) * (q[1] - q[0]) % P
    b = (p[1] + p[0]) * (q[1] + q[0]) % P
    c = 2 * D * p[3] * q[3] % P
    d = 2 * p[2] * q[2] % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % P, g * h % P, f * g % P, e * h % P


def _double(p):
    # type: (Point) -> Point
    a, b = p[0] * p[0] % P, p[1] * p[1] % P
    h = a + b
    e = h - (p[0] + p[1]) * (p[0] + p[1])
    g = a - b
    f = 2 * p[2] * p[2] + g
    e, f = e % P, f % P
    return e * f % P, g * h % P, f * g % P, e * h % P


def _negative(p):
    # type: (Point) -> Point
    return P - p[0], p[1], p[2], P - p[3]


def _combine(s, p, h, q):
    # type: (int, Point, int, Point) -> Point
    """s*p + h*q in one pass over the bits of both."""
    table = (IDENTITY, p, q, _add(p, q))
    total = IDENTITY
    for bit in range(max(s.bit_length(), h.bit_length()) - 1, -1, -1):
        total = _double(total)
        index = (s >> bit & 1) | (h >> bit & 1) << 1
        if index:
            total = _add(total, table[index])
    return total


def _small(p):
    # type: (Point) -> bool
    """Whether the point's order divides 8: such a key "signs" many messages at once."""
    p = _double(_double(_double(p)))
    return p[0] == 0 and p[1] == p[2]


def _decode(data):
    # type: (bytes) -> Optional[Point]
    y = int.from_bytes(data, "little")
    sign, y = y >> 255, y & (2**255 - 1)
    x = _x(y) if y < P else None
    if x is None or (x == 0 and sign):
        return None
    x = P - x if x & 1 != sign else x
    return x, y, 1, x * y % P


def _x(y):
    # type: (int) -> Optional[int]
    """A square root of (y^2 - 1) / (d*y^2 + 1); None where there is none."""
    u, v = (y * y - 1) % P, (D * y * y + 1) % P
    x = u * pow(v, 3, P) * pow(u * pow(v, 7, P), (P - 5) // 8, P) % P
    if v * x * x % P == u:
        return x
    x = x * ROOT_OF_MINUS_ONE % P
    return x if v * x * x % P == u else None


def _encode(p):
    # type: (Point) -> bytes
    inverse = pow(p[2], P - 2, P)
    x, y = p[0] * inverse % P, p[1] * inverse % P
    return (y | (x & 1) << 255).to_bytes(32, "little")


BASE = _decode((4 * pow(5, P - 2, P) % P).to_bytes(32, "little")) or IDENTITY
