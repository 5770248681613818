"""Small valid files of the formats whose free bytes are known."""

import io
import struct
import zipfile


def pe(*, subsystem=3, certificates=0, sections=2):
    """Return a program of 64 bits with a section of code and one of imports, each with 512 bytes in the file."""
    headers = bytearray(0x200)
    headers[:2] = b"MZ"
    struct.pack_into("<I", headers, 0x3C, 0x80)
    struct.pack_into("<4sHHIIIHH", headers, 0x80, b"PE\0\0", 0x8664, sections, 0, 0, 0, 240, 0x22)
    struct.pack_into("<HBBIIIII", headers, 0x98, 0x20B, 14, 0, 0x200, 0x200, 0, 0x1000, 0x1000)
    struct.pack_into("<QII", headers, 0x98 + 24, 0x140000000, 0x1000, 0x200)
    struct.pack_into("<HHHHHHIIIIHH", headers, 0x98 + 40, 6, 0, 0, 0, 6, 0, 0, 0x3000, 0x200, 0, subsystem, 0)
    struct.pack_into("<QQQQII", headers, 0x98 + 72, 0x100000, 0x1000, 0x100000, 0x1000, 0, 16)
    struct.pack_into("<II", headers, 0x98 + 112 + 8, 0x2000, 40)
    struct.pack_into("<II", headers, 0x98 + 112 + 32, 0x600 if certificates else 0, certificates)
    for i, (name, used, flags) in enumerate(((b".text", 16, 0x60000020), (b".idata", 110, 0xC0000040))):
        place = 0x188 + 40 * i
        struct.pack_into(
            "<8sIIII12xI", headers, place, name, used, 0x1000 * (i + 1), 0x200, 0x200 * (i + 1), flags
        )
    code = bytes(range(16)).ljust(0x200, b"\0")
    imports = bytearray(0x200)
    struct.pack_into("<IIIII", imports, 0, 0x2000 + 40, 0, 0, 0x2000 + 72, 0x2000 + 56)
    struct.pack_into("<QQ", imports, 40, 0x2000 + 86, 0)
    struct.pack_into("<QQ", imports, 56, 0x2000 + 86, 0)
    imports[72:85] = b"KERNEL32.dll\0"
    imports[86:100] = b"\0\0ExitProcess\0"
    return bytes(headers) + code + bytes(imports) + bytes(certificates)


def archive(*, comment=b"of the archive", method=zipfile.ZIP_DEFLATED, names=("a.txt", "b/c.bin")):
    """Return a ZIP archive of files with a comment for each."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as writer:
        writer.comment = comment
        for i, name in enumerate(names):
            entry = zipfile.ZipInfo(name, (2026, 11, 30, 12, 0, 2 * i))
            entry.comment, entry.compress_type = b"of a file", method
            writer.writestr(entry, bytes(range(100)) * 3)
    return file.getvalue()


def pdf(*, extra=b""):
    """Return a PDF file of one page, with comments, and with percent signs in a string and in a stream."""
    stream = b"BT (text) Tj ET % a comment of the page"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >> % free",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] /Contents 4 0 R >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Title (100 % (of) \\) it) " + extra + b">>",
    ]
    content, offsets = bytearray(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"), []
    for i, each in enumerate(objects):
        offsets.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (i + 1, each)
    start = len(content)
    content += b"xref\n0 6\n0000000000 65535 f \n" + b"".join(
        b"%010d 00000 n \n" % offset for offset in offsets
    )
    content += b"trailer\n<< /Size 6 /Root 1 0 R /Info 5 0 R >>\nstartxref\n%d\n%%%%EOF\n" % start
    return bytes(content)
