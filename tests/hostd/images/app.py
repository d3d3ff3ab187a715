"""The application of the test images: says what it finds, and keeps a marker in its working directory.

    app.py report          prints the facts and the marker
    app.py write TEXT      writes the marker, durably, then does the same
"""
import os
import sys

MARKER = "marker.txt"


def read(path, default):
    try:
        with open(path) as file:
            return file.read().strip()
    except FileNotFoundError:
        return default


def write_marker(text):
    with open(MARKER, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def facts():
    disk = os.statvfs("/")
    yield "system", read("/etc/debian_version", "unknown")
    yield "kernel", os.uname().release
    yield "python", sys.version.split()[0]
    yield "user", f"{os.getuid()}:{os.getgid()}"
    yield "directory", os.getcwd()
    yield "colour", os.environ.get("APP_COLOUR", "unset")
    yield "motto", os.environ.get("APP_MOTTO", "unset")
    yield "variant", read("variant", "1")
    yield "disk-megabytes", str(disk.f_blocks * disk.f_frsize // 1000000)
    yield "removed-file", "present" if os.path.exists("removed-by-layer-4.txt") else "absent"
    yield "linked-file", read("same-file.txt", "absent")
    yield "marker", read(MARKER, "none")


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write_marker(" ".join(sys.argv[2:]))
    for name, value in facts():
        print(f"APP {name}: {value}")
