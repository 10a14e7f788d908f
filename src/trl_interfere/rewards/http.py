"""Requests to servers that may be busy."""

import requests
from urllib3.util import Retry


_BUSY = (408, 409, 429, *range(500, 600))


def session(retries: int) -> requests.Session:
    """A client that tries again, at growing intervals, where a server does not answer or is busy."""
    client = requests.Session()
    settings = {"allowed_methods": None, "status_forcelist": _BUSY, "raise_on_status": False}
    retry = Retry(retries, backoff_factor=0.5, backoff_max=8, **settings)
    for scheme in ("http://", "https://"):
        client.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=32, max_retries=retry))
    return client
