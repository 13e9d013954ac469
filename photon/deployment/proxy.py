"""The proxy before a SuperLink: nginx, told what silos may reach."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Proxy:
    """What differs from place to place in the proxy's configuration.

    Attributes
    ----------
    listen
        ``port`` or ``host:port`` for silos.
    superlink
        ``host:port`` of the SuperLink.
    name
        Name that the SuperLink's certificate is for.
    certificate, key, authority
        Files of the aggregator's certificate and of what signed it.
    scratch
        Folder for nginx's own files.
    resolver
        Name server by which the SuperLink's address is found again and again; None: it has a fixed one.
    """

    listen: str
    superlink: str
    name: str
    certificate: Path
    key: Path
    authority: Path
    scratch: Path
    resolver: str | None = None

    def configuration(self) -> str:
        """Return nginx's configuration."""
        resolver = (
            ""
            if self.resolver is None
            else f"""
    # Docker's name server, asked again and again, because a restarted SuperLink may have another address.
    resolver {self.resolver} valid=5s ipv6=off;
"""
        )
        return f"""\
{_HEAD}worker_processes 1;
pid {_quoted(self.scratch / "nginx.pid")};
error_log /dev/stderr warn;

events {{
    worker_connections 1024;
}}

http {{
    access_log off;
    server_tokens off;

    client_body_temp_path {_quoted(self.scratch / "body")};
    proxy_temp_path {_quoted(self.scratch / "proxy")};
    fastcgi_temp_path {_quoted(self.scratch / "fastcgi")};
    uwsgi_temp_path {_quoted(self.scratch / "uwsgi")};
    scgi_temp_path {_quoted(self.scratch / "scgi")};
{resolver}
    server {{
        listen {self.listen} ssl http2;

        ssl_certificate {_quoted(self.certificate)};
        ssl_certificate_key {_quoted(self.key)};
{_TLS}
        proxy_ssl_trusted_certificate {_quoted(self.authority)};
        proxy_ssl_verify on;
        proxy_ssl_name {self.name};
        proxy_ssl_protocols TLSv1.2 TLSv1.3;

        set $superlink https://{self.superlink};

{_LOCATIONS}    }}
}}
"""


_HEAD = """\
# What silos may reach of the SuperLink: its Fleet API and its health. The Control API, by which anyone can
# start code on every node, and the Runtime API lie behind the same port and are not passed on.
#
# TLS ends here and begins anew towards the SuperLink. A node signs the time, not the connection, so its
# signature passes.
"""

_TLS = """\
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_session_cache shared:silos:1m;

        # Flower cuts tensors into pieces of 5 MB; nothing a silo sends is near this.
        client_max_body_size 64m;
        client_body_timeout 120s;
        keepalive_timeout 120s;
        keepalive_requests 100000;

        # Pieces of models pass through; none of them is written to this disk.
        proxy_request_buffering off;
        proxy_buffering off;
        proxy_http_version 1.1;
        proxy_set_header Host $host;
        proxy_read_timeout 120s;
        proxy_send_timeout 120s;
"""

_LOCATIONS = """\
        # The whole path, letters only: no encoded or doubled slash or dot reaches the SuperLink.
        location ~ ^/v1/fleet/[a-z-]+$ {
            limit_except POST { deny all; }
            if ($request_uri !~ "^/v1/fleet/[a-z-]+$") { return 403; }
            proxy_pass $superlink;
        }

        location = /health {
            proxy_pass $superlink;
        }

        location / {
            return 403;
        }
"""


def _quoted(path: Path) -> str:
    return f'"{path}"' if " " in str(path) else str(path)
