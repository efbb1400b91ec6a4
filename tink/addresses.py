"""What a URL or a host is, as people write them into settings and options."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

# Of the URLs of databases.
_DATABASES = ("postgresql+psycopg", "postgresql", "postgres")
NO_DATABASE_URL = (
    "it is not like postgresql+psycopg://USER:PASSWORD@HOST/DATABASE, with %40 for an @ in the password "
    "(leave it empty for SQLite files in the home)"
)


def is_origin(url: str) -> bool:
    """Whether it says where a server is, and nothing else."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    whole = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and port != 0
    return bool(whole) and not (parts.path or parts.query or parts.fragment)


def is_database_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in _DATABASES and "://" in url and parts.netloc.count("@") <= 1


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it. Of names that is `localhost` alone: others may change."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
