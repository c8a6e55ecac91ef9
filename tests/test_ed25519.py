"""The agent's signature check: RFC 8032's vectors, agreement with OpenSSL, one spelling of each thing."""

import random

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edgeformer_agent import ed25519

# RFC 8032, 7.1: secret key, public key, message, signature
VECTORS = {
    "1": (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    "2": (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    "3": (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
    "SHA(abc)": (
        "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a"
        "2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b589"
        "09351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704",
    ),
}
SMALL_ORDER = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
]


def openssl(public: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except InvalidSignature:
        return False
    return True


def signed(seed: int, size: int = 40) -> tuple[bytes, bytes, bytes]:
    drawn = random.Random(seed)
    key, message = Ed25519PrivateKey.from_private_bytes(drawn.randbytes(32)), drawn.randbytes(size)
    return key.public_key().public_bytes_raw(), key.sign(message), message


@pytest.mark.parametrize("name", VECTORS)
def test_rfc_vector(name: str) -> None:
    secret, public, message, signature = (bytes.fromhex(text) for text in VECTORS[name])
    assert Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw() == public
    assert ed25519.verify(public, signature, message)
    assert not ed25519.verify(public, signature, message + b"\0")


@pytest.mark.parametrize("seed", range(60))
def test_agrees_with_openssl(seed: int) -> None:
    public, signature, message = signed(seed, seed * 7)
    assert ed25519.verify(public, signature, message)
    drawn = random.Random(~seed)
    for part in range(3):
        parts = [bytearray(public), bytearray(signature), bytearray(message or b"\0")]
        at = drawn.randrange(len(parts[part]))
        parts[part][at] ^= 1 << drawn.randrange(8)
        tampered = [bytes(item) for item in parts]
        assert ed25519.verify(*tampered) == openssl(*tampered) is False


def test_s_has_one_spelling() -> None:
    public, signature, message = signed(1)
    s = int.from_bytes(signature[32:], "little")
    for other in (s + ed25519.L, s + 2**255):
        if other < 2**256:
            assert not ed25519.verify(public, signature[:32] + other.to_bytes(32, "little"), message)


@pytest.mark.parametrize("sizes", [(31, 64), (33, 64), (0, 64), (32, 63), (32, 65), (32, 0)])
def test_lengths(sizes: tuple[int, int]) -> None:
    public, signature, message = signed(2)
    assert not ed25519.verify((public + b"\0")[: sizes[0]], (signature + b"\0")[: sizes[1]], message)


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_a_key_of_small_order_signs_nothing(point: str) -> None:
    public = bytes.fromhex(point)
    assert not ed25519.valid(public)
    # With A of order n, R = sB verifies wherever n divides h: for the first point always, for the others soon.
    for s in range(1, 30):
        r = ed25519._encode(ed25519._combine(s, ed25519.BASE, 0, ed25519.BASE))
        assert not ed25519.verify(public, r + s.to_bytes(32, "little"), b"anything")


def test_openssl_takes_a_key_of_small_order() -> None:
    """So that the test above is known to test something."""
    forged = ed25519._encode(ed25519.BASE) + (1).to_bytes(32, "little")
    assert openssl(bytes.fromhex(SMALL_ORDER[0]), forged, b"anything")


def test_r_of_small_order() -> None:
    """R = identity needs no nonce: s = h*a."""
    drawn = random.Random(3).randbytes(32)
    public = Ed25519PrivateKey.from_private_bytes(drawn).public_key().public_bytes_raw()
    import hashlib

    half = bytearray(hashlib.sha512(drawn).digest()[:32])
    half[0] &= 248
    half[31] = half[31] & 63 | 64
    r = bytes.fromhex(SMALL_ORDER[0])
    h = int.from_bytes(hashlib.sha512(r + public + b"m").digest(), "little")
    signature = r + (h * int.from_bytes(half, "little") % ed25519.L).to_bytes(32, "little")
    assert openssl(public, signature, b"m")
    assert not ed25519.verify(public, signature, b"m")


def test_y_beyond_the_field_is_no_second_spelling() -> None:
    canonical = [k for k in range(19) if ed25519._decode(k.to_bytes(32, "little"))]
    assert len(canonical) > 5
    for k in canonical:
        for sign in (0, 1 << 255):
            assert ed25519._decode((ed25519.P + k | sign).to_bytes(32, "little")) is None


def test_minus_zero_is_no_point() -> None:
    assert ed25519._decode((1 | 1 << 255).to_bytes(32, "little")) is None
    assert ed25519._decode((ed25519.P - 1 | 1 << 255).to_bytes(32, "little")) is None


def test_half_of_all_y_are_on_no_curve() -> None:
    drawn = random.Random(4)
    found = [ed25519.valid(drawn.randrange(ed25519.P).to_bytes(32, "little")) for _ in range(200)]
    assert 60 < sum(found) < 140
