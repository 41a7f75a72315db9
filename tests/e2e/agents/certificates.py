"""A server's certificate for this machine's loopback, from an authority that is made with it: real ones, briefly valid.

As a program: `certificates.py SECONDS COMMAND...` writes `authority.pem` and `server.pem`, which expires after so many
seconds, and becomes the command. So the time that a sandbox takes to begin is not taken from the certificate's.
"""

import datetime as dt
import ipaddress
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

YEAR = dt.timedelta(days=365)


@dataclass(frozen=True, slots=True)
class Authority:
    """One that clients trust; valid for a year."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        """What a client is to trust."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return _key_pem(self.key)


def make_authority() -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority")])
    begins = dt.datetime.now(dt.UTC)
    unsigned = _certificate(name, name, key, begins, begins + YEAR)
    basics = x509.BasicConstraints(ca=True, path_length=0)
    return Authority(key, unsigned.add_extension(basics, critical=True).sign(key, hashes.SHA256()))


def read_authority(key_pem: bytes, pem: bytes) -> Authority:
    key = serialization.load_pem_private_key(key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Authority(key, x509.load_pem_x509_certificate(pem))


def server_pem(authority: Authority, valid: dt.timedelta = YEAR) -> bytes:
    """Key and certificate of a server at 127.0.0.1, valid from this very second on."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a server")])
    begins = dt.datetime.now(dt.UTC)
    unsigned = _certificate(name, authority.certificate.subject, key, begins, begins + valid)
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = unsigned.add_extension(here, critical=False).sign(authority.key, hashes.SHA256())
    return _key_pem(key) + signed.public_bytes(serialization.Encoding.PEM)


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    begins: dt.datetime,
    ends: dt.datetime,
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    return builder.serial_number(x509.random_serial_number()).not_valid_before(begins).not_valid_after(ends)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    encryption = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


if __name__ == "__main__":
    made = make_authority()
    Path("authority.pem").write_bytes(made.pem)
    Path("authority.key").write_bytes(made.key_pem)
    Path("server.pem").write_bytes(server_pem(made, dt.timedelta(seconds=float(sys.argv[1]))))
    os.execvp(sys.argv[2], sys.argv[2:])
