"""Closes the listening socket of a server without the loss of connections."""

import ctypes
import socket
import struct
import sys
from contextlib import suppress

_ATTACH_FILTER = 26
"""SO_ATTACH_FILTER of Linux, which the module `socket` does not define"""
_WITHOUT_SYN = (
    (0x30, 0, 0, 13),  # load the byte of the TCP header with its flags
    (0x45, 0, 1, 0x02),  # if SYN is set,
    (0x06, 0, 0, 0),  # drop the packet;
    (0x06, 0, 0, 0xFFFFFFFF),  # otherwise accept it
)
"""instructions of BPF (code, jump if true, jump if false, operand), see McCanne and Jacobson, "The BSD Packet Filter",
USENIX 1993"""


def refuse_connections(listener: socket.socket) -> None:
    """Let a listening socket begin no further connections, while those that were begun can still be accepted.

    A connection that arrives between the last call of `accept` and the close would be reset, and its request lost. A
    client whose packet is dropped sends it again after a second, when the port is closed, and connects elsewhere.
    Without the filter, on other systems than Linux, connections of this moment may be reset.
    """
    if sys.platform == "linux":
        content = b"".join(struct.pack("HBBI", *instruction) for instruction in _WITHOUT_SYN)
        program = ctypes.create_string_buffer(content)
        option = struct.pack("HL", len(_WITHOUT_SYN), ctypes.addressof(program))
        with suppress(OSError):  # of a kernel without filters
            listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, option)
