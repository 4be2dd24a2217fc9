"""A switch that holds every frame for a fixed time: the latency of a network lab.

    python examples/benchmarks/delay_line.py 0.025 port0 port1    # seconds, and network interfaces

``netlab.py --latency`` starts it in place of the bridge, in the namespace of the switch, since not every kernel has
``netem``. A frame that comes in at one port leaves at the port of its destination, the given seconds later, in order.
Any number of frames are on their way at once, so it is no limit on bandwidth. A limit (tc tbf) on a port applies to
what leaves there, after the delay.

It says "ready" once it switches frames, and ends when its standard input is closed: so it does not outlive its lab.
"""

import contextlib
import os
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence

# Constants of Linux that Python does not name: include/uapi/linux/if_packet.h and if_ether.h, asm-generic/socket.h.
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_ETH_P_ALL = 3
# A virtual link leaves two things to the receiver: to cut data into segments, and to add checksums. PACKET_VNET_HDR
# puts what is left to do in front of the frame (struct virtio_net_hdr), and the kernel reads it again from a frame to
# send. So frames may be as long as TCP makes them.
_VNET_HDR_BYTES = 10
_FRAME_BYTES = 1 << 17
# What a socket may hold: more than the 8 MB that wait for a rate limit of netlab.py.
_BUFFER_BYTES = 64 << 20
# Frames taken from one port before the others have their turn.
_FRAMES_A_TURN = 64


def open_port(name: str) -> socket.socket:
    """A socket that receives what comes in at an interface, and sends there."""
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    port.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
        port.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    port.setblocking(False)
    # Only now, or it would have received from all interfaces before.
    port.bind((name, _ETH_P_ALL))
    return port


class DelayLine:
    """Switches frames between ports, a fixed time after they came in.

    Args:
        latency: Seconds.
        ports: From :func:`open_port`.
    """

    def __init__(self, latency: float, ports: Sequence[socket.socket]) -> None:
        self.latency, self.ports = latency, ports
        self._on_their_way: deque[tuple[float, socket.socket, bytes]] = deque()
        self._port_of: dict[bytes, socket.socket] = {}

    def run(self, until_readable: int) -> None:
        """Switch frames until a file descriptor becomes readable."""
        ports = {port.fileno(): port for port in self.ports}
        while True:
            wait = max(0.0, self._on_their_way[0][0] - time.monotonic()) if self._on_their_way else None
            readable, _, _ = select.select([until_readable, *ports], [], [], wait)
            if until_readable in readable:
                return
            for number in readable:
                self._receive(ports[number])
            self._send_what_is_due()

    def _receive(self, port: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_FRAMES_A_TURN):
                frame = port.recv(_FRAME_BYTES)
                self._on_their_way.append((time.monotonic() + self.latency, port, frame))

    def _send_what_is_due(self) -> None:
        while self._on_their_way and self._on_their_way[0][0] <= time.monotonic():
            _, source, frame = self._on_their_way.popleft()
            for port in self._destinations(source, frame):
                # A switch drops what finds no room in a queue.
                with contextlib.suppress(OSError):
                    port.send(frame)

    def _destinations(self, source: socket.socket, frame: bytes) -> Sequence[socket.socket]:
        """The port that the destination's address was last seen at; all others if there is none, as for a broadcast."""
        destination, sender = (frame[start : start + 6] for start in (_VNET_HDR_BYTES, _VNET_HDR_BYTES + 6))
        self._port_of[sender] = source
        if destination in self._port_of:
            return [self._port_of[destination]]
        return [port for port in self.ports if port is not source]


def main() -> None:
    """Run the command line."""
    latency, ports = float(sys.argv[1]), [open_port(name) for name in sys.argv[2:]]
    # The replicas keep all cores busy, and a frame must not wait for them. Not every container allows it.
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    print("ready", flush=True)
    DelayLine(latency, ports).run(until_readable=sys.stdin.fileno())


if __name__ == "__main__":
    main()
