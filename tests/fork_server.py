"""A process that has imported torch, of which tests get copies in place of new processes of Python.

A new process that reads one file, or works on shards, takes two seconds to import its libraries. A copy of a process
that has imported them takes milliseconds. Users get new processes: the fixture `new_processes` gives them to tests that
depend on it.
"""

import array
import atexit
import builtins
import contextlib
import gc
import os
import pickle
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from contextlib import suppress
from pathlib import Path

MODULES = (
    "numpy",
    "safetensors.torch",
    "torch",
    "holdfast.io.sandbox.sandbox_main",
    "holdfast.io.sandbox.programs",
    "holdfast.io.sandbox.tables",
    "holdfast.io.sandbox.weights",
    "holdfast.runs.engine.worker",
    "holdfast.server.server_worker",
)
"""modules that are imported once, if their libraries are installed; none starts a thread"""
_LENGTH = struct.Struct("<Q")
_MOST_FILES = 32
"""largest number of open files that a process is given"""


def _read(pipe, n):
    content = b""
    while len(content) < n:
        part = pipe.recv(n - len(content))
        if not part:
            raise EOFError
        content += part
    return content


def _receive(connection):
    """A request, and the open files that belong to it."""
    files = array.array("i")
    first, ancillary, *_ = connection.recvmsg(_LENGTH.size, socket.CMSG_LEN(_MOST_FILES * files.itemsize))
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(content[: len(content) - len(content) % files.itemsize])
    if not first:
        raise EOFError
    first += _read(connection, _LENGTH.size - len(first))
    return pickle.loads(_read(connection, _LENGTH.unpack(first)[0])), list(files)


def _become(request, files):
    """Let this copy of the server be the process that was asked for, and return its code and global names."""
    for kind in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["session"]:
        os.setsid()
    kept = [os.dup(file) for file in files]
    high = [os.open(os.devnull, os.O_RDWR)]
    while high[-1] <= max(
        request["numbers"]
    ):  # numbers that the process uses must not be those of other files
        high.append(os.open(os.devnull, os.O_RDWR))
    moved = [os.dup(file) for file in kept]
    for file, number in zip(moved, request["numbers"], strict=True):
        os.dup2(file, number)
    numbers = set(request["numbers"])
    for file in list(Path("/proc/self/fd").iterdir()):
        if int(file.name) not in numbers:
            with suppress(OSError):
                os.close(int(file.name))
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, closefd=False) for number, mode in enumerate(("r", "w", "w"))
    )
    _, _, _, code, *arguments = request["command"]
    sys.argv = ["-c", *arguments]
    added = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [*added, *sys.path]
    return code


def serve(address):
    """Answer each connection by a copy of this process, and return the code of the copy in it."""
    waiting = {}
    reading, writing = os.pipe()
    for end in (reading, writing):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writing)
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(address)
        listener.listen(64)
        gc.collect()
        gc.freeze()
        print("ready", flush=True)
        selector.register(listener, selectors.EVENT_READ)
        selector.register(reading, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == 0:  # the process of the tests has ended
                    os._exit(0)
                if key.fileobj == reading:
                    with suppress(BlockingIOError):
                        os.read(reading, 4096)
                    continue
                connection, _ = listener.accept()
                request, files = _receive(connection)
                process = os.fork()
                if not process:
                    signal.set_wakeup_fd(-1)
                    for each in (selector, listener, connection, *waiting.values()):
                        each.close()
                    return _become(request, files)
                for file in files:
                    os.close(file)
                connection.sendall(_LENGTH.pack(process))
                waiting[process] = connection
            while waiting:
                try:
                    process, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if not process:
                    break
                with waiting.pop(process) as connection, suppress(OSError):
                    connection.sendall(struct.pack("<q", os.waitstatus_to_exitcode(status)))


def run_as_main(code):
    """Run the code as the main program, and end the process. The objects of the libraries are left as they are, because
    their pages would be copied.
    """
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__ = builtins
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), main.__dict__)
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except SystemExit as end:
        status = end.code
        if status is not None and not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit((status or 0) & 255)


_SERVER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parent)!r})
from importlib import import_module
import fork_server
for name in {MODULES!r}:
    with fork_server.suppress(ImportError):
        import_module(name)
del sys.path[0]
fork_server.run_as_main(fork_server.serve(sys.argv[1]))
"""


class ForkServer:
    """The server, which is started when the first process is asked for."""

    PIPE, DEVNULL, TimeoutExpired = subprocess.PIPE, subprocess.DEVNULL, subprocess.TimeoutExpired

    def __init__(self):
        self._process = None

    def start(self):
        """Start the server if it does not run."""
        if self._process is None or self._process.poll() is not None:
            self._folder = tempfile.mkdtemp(prefix="fork-")
            self._address = str(Path(self._folder) / "socket")
            command = [sys.executable, "-P", "-c", _SERVER, self._address]
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1",
                "MALLOC_ARENA_MAX": "2",
            }
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            atexit.register(self.close)
            assert self._process.stdout.readline() == b"ready\n"

    def _connected(self):
        self.start()
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        return connection

    def close(self):
        """End the server. Processes that it has started continue."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
            self._process = None

    def Popen(self, command, **options):
        """A process that runs a command of the form `python -P -c CODE …`."""
        assert command[:3] == [sys.executable, "-P", "-c"]
        return Copy(self._connected(), command, **options)

    def run(self, command, *, input, stdout, stderr, env, timeout, check):
        """As `subprocess.run` of such a command, with a pipe for the standard error."""
        assert (stdout, stderr, check) == (self.DEVNULL, self.PIPE, False)
        with tempfile.TemporaryFile() as content, tempfile.TemporaryFile() as errors:
            content.write(input)
            content.seek(0)
            process = Copy(self._connected(), command, env=env, stdin=content, stderr=errors)
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
            errors.seek(0)
            return subprocess.CompletedProcess(command, code, None, errors.read())


class Copy:
    """A copy of the server, as a `subprocess.Popen`."""

    def __init__(
        self,
        connection,
        command,
        *,
        env=None,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=None,
        start_new_session=False,
        pass_fds=(),
    ):
        self._connection, self.returncode, self.stdin, self.stdout = connection, None, None, None
        opened = []

        def null(flags):
            opened.append(os.open(os.devnull, flags))
            return opened[-1]

        if stdin is subprocess.PIPE:
            inner, outer = os.pipe()
            opened.append(inner)
            self.stdin, first = os.fdopen(outer, "wb"), inner
        else:
            first = null(os.O_RDONLY) if stdin is subprocess.DEVNULL else stdin.fileno()
        if stdout is subprocess.PIPE:
            outer, inner = os.pipe()
            opened.append(inner)
            self.stdout, second = os.fdopen(outer, "rb"), inner
        else:
            second = null(os.O_WRONLY)
        third = 2 if stderr is None else stderr.fileno()
        files = array.array("i", [first, second, third, *pass_fds])
        request = {
            "command": command,
            "environment": dict(os.environ if env is None else env),
            "folder": str(Path.cwd()),
            "numbers": [0, 1, 2, *pass_fds],
            "session": start_new_session,
        }
        content = pickle.dumps(request)
        connection.sendmsg([_LENGTH.pack(len(content))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        connection.sendall(content)
        for file in opened:
            os.close(file)
        (self.pid,) = _LENGTH.unpack(_read(connection, _LENGTH.size))

    def poll(self):
        """The exit code, or None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        """The exit code, after the process has ended."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                first = self._connection.recv(1)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("a copy", timeout) from None
            self._connection.settimeout(None)
            # without an answer the server has ended
            rest = _read(self._connection, 7) if first else b""
            self.returncode = struct.unpack("<q", first + rest)[0] if first else -signal.SIGKILL
            self._connection.close()
        return self.returncode

    def send_signal(self, kind):
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, which is not known here yet
                os.kill(self.pid, kind)

    def kill(self):
        """Kill it."""
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)
