"""Gives MP3 files that do not state their length a Xing header with their number of frames. Without it, libsndfile only
estimates the length from the bit rate of the first frame."""

import mmap

_KBITS = {  # bit rates of layer III in kbit/s, by the header's version bits, for the bit-rate indices 1 to 14
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # MPEG-1
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG-2
    0: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG-2.5
}
# Sample rates in Hz, by the header's version bits, for the sample-rate indices 0 to 2.
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


def _size(header: bytes) -> int:
    """Returns the size in bytes of the layer III frame with this header, or 0 if the bytes are no such header or do not
    determine the size."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    version, bits, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if version not in _RATES or not 0 < bits < 15 or rate == 3:
        return 0
    samples = 144_000 if version == 3 else 72_000
    return samples * _KBITS[version][bits - 1] // _RATES[version][rate] + (header[2] >> 1 & 1)


def with_length(data: bytes | mmap.mmap) -> bytes | None:
    """Returns the MP3 file with a Xing header in front that states its number of frames. Returns None if its first
    frame already has a header (Xing, Info or VBRI), or if the file does not begin with frames of layer III."""
    at = 0
    while data[at : at + 3] == b"ID3" and len(data) >= at + 10:
        a, b, c, d = data[at + 6 : at + 10]
        at += 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if data[at + 5] & 0x10 else 0)
    start, header, count, lost = at, data[at : at + 4], 0, False
    while 0 <= at < len(data):
        size = _size(data[at : at + 4])
        if not size or (lost and not _size(data[at + size : at + size + 4])):
            if not count:
                return None
            at, lost = data.find(b"\xff", at + 1), True  # skip bytes that are not a frame
            continue
        lost = False
        if not count and any(name in data[at : at + size] for name in (b"Xing", b"Info", b"VBRI")):
            return None
        count += at + size <= len(data)
        at += size
    if not count:
        return None
    # The first frame's header, without a checksum, and with a bit rate at which the frame has room for a Xing header.
    head = bytes((header[0], header[1] | 1, header[2] & 0x0D | 0x90, header[3]))
    mono, first = head[3] >> 6 == 3, head[1] >> 3 & 3 == 3  # whether it has one channel, and is of MPEG-1
    gap = (17 if mono else 32) if first else (9 if mono else 17)  # bytes between the frame's header and the Xing header
    table = b"Xing" + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    return (head + bytes(gap) + table).ljust(_size(head), b"\0") + data[start:]
