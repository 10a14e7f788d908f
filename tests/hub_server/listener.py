"""
The address of the local Hub, which must be known before the first import of huggingface_hub: it reads it only once.

Nothing listens on the socket until a test asks for the fixture `hub`.
"""

import socket


LISTENER = socket.socket()
LISTENER.bind(("127.0.0.1", 0))
URL = "http://{}:{}".format(*LISTENER.getsockname())
