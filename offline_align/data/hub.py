"""Whether the Hugging Face Hub can be reached, asked once and before its client retries for a minute."""

import logging
import os
import socket
from urllib.parse import urlsplit

from offline_align.errors import ConfigError

_TIMEOUT_SECONDS = 10.0
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def require_hub(name: str) -> None:
    """Raise ConfigError in one line if the Hub that has the data set `hf:...` cannot be reached.

    Behind a proxy and with HF_HUB_OFFLINE nothing is checked, because only the client knows what to do.
    """
    # The client logs every retry twice. The error that ends it says the same.
    for noisy in ("huggingface_hub", "huggingface_hub.utils._http", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
    if offline or any(os.environ.get(proxy) for proxy in _PROXIES):
        return
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    host, port = endpoint.hostname or "huggingface.co", endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), _TIMEOUT_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"data.input={name}: {host} cannot be reached ({error.strerror or error}); download the data set "
            "where there is a network and give the path of its files, or set HTTPS_PROXY or HF_ENDPOINT"
        ) from error
