"""Certificates and keys for a deployment: a small certificate authority for a lab, and the keys of nodes.

The authority's key stays beside the server's; whoever has it can pose as the server. For more than a lab, give the
operator's own certificate instead.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from privfed.errors import ConfigError

DAYS = 365
_PEM = serialization.Encoding.PEM


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFiles:
    """What a SuperLink needs for TLS: the authority's certificate, which every site gets, and the server's own pair."""

    authority: Path
    certificate: Path
    key: Path

    def check(self) -> ServerFiles:
        """Return the files if they are there.

        Raises:
            ConfigError: If one is missing.
        """
        for path in (self.authority, self.certificate, self.key):
            if not path.is_file():
                raise ConfigError(f"There is no file {path}: give --ca, --certificate and --key together, or none.")
        return self


def lab_files(folder: Path, hosts: Sequence[str]) -> ServerFiles:
    """Return a lab's certificates; made where they are missing, with these hosts' names and addresses in them."""
    found = ServerFiles(authority=folder / "ca.pem", certificate=folder / "server.pem", key=folder / "server.key")
    if found.certificate.exists():
        return found.check()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    name = _name("privfed lab authority")
    authority = _builder(name, name, ca_key.public_key(), authority=True).sign(ca_key, hashes.SHA256())
    server = (
        _builder(_name(hosts[0]), name, key.public_key(), authority=False)
        .add_extension(x509.SubjectAlternativeName([_host(each) for each in hosts]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    found.authority.write_bytes(authority.public_bytes(_PEM))
    _write_private(found.key, _pem(key))
    found.certificate.write_bytes(server.public_bytes(_PEM))
    return found


def node_keys(folder: Path) -> tuple[Path, str]:
    """Return a SuperNode's private key file and its public key, as OpenSSH writes them; made where they are missing."""
    private, public = folder / "node", folder / "node.pub"
    if not private.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = ec.generate_private_key(ec.SECP384R1())
        raw = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        public.write_bytes(raw + b"\n")
        _write_private(
            private,
            key.private_bytes(_PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()),
        )
    return private, public.read_text(encoding="ascii").strip()


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, *, authority: bool
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not authority,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=authority,
                crl_sign=authority,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _write_private(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
