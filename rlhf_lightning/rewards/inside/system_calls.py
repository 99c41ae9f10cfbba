"""A seccomp filter: the system calls that no program under test has business with answer "not permitted".

Namespaces are the wall; this is for what they and the resource limits leave open: memory that no limit counts (shared memory,
memfd, a tmpfs in a namespace within), other processes' memory, and the parts of the kernel with the most holes.
"""

import ctypes
import errno
import platform
import struct

# Numbers by machine: (of x86_64, of aarch64).
FORBIDDEN = {
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "personality": (135, 92), "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), (435, 435)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
X32 = 0x40000000  # x86_64's second numbering of the same calls
NEW_NAMESPACES = 0x7E020000  # CLONE_NEW* of clone's flags

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
KILL, ALLOW, ERROR = 0x80000000, 0x7FFF0000, 0x00050000
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2


def known_machine() -> bool:
    """Whether there is a filter for this machine."""
    return platform.system() == "Linux" and platform.machine() in MACHINES


def program() -> bytes:
    """The filter in BPF, eight bytes an instruction: code, jump if true, jump if false, constant."""
    which, machine = MACHINES[platform.machine()]
    numbers = sorted(calls[which] for calls in FORBIDDEN.values())
    last = (
        len(numbers) + 11
    )  # kill; before it: clone3?, clone?, its flags, any new namespace?, allow, deny, no such call
    lines = [(LOAD, 0, 0, MACHINE), (EQUAL, 0, last - 2, machine), (LOAD, 0, 0, NUMBER), (AT_LEAST, last - 4, 0, X32)]
    lines += [(EQUAL, last - 7 - i, 0, number) for i, number in enumerate(numbers)]
    lines += [
        (EQUAL, 5, 0, CLONE3[which]),  # its flags can't be read from here; the C library falls back on clone
        (EQUAL, 0, 2, CLONE[which]),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (ANY_BIT, 1, 0, NEW_NAMESPACES),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, ERROR | errno.EPERM),
        (RETURN, 0, 0, ERROR | errno.ENOSYS),
        (RETURN, 0, 0, KILL),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def forbid() -> None:
    """Install the filter for this process and all that it starts; it can't be taken off again."""
    libc = ctypes.CDLL(None, use_errno=True)
    text = program()
    code = ctypes.create_string_buffer(text, len(text))

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    filter_ = Filter(len(text) // 8, ctypes.addressof(code))
    zero = ctypes.c_ulong(0)
    install = (PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(filter_))
    for option, second, third in ((PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero), install):
        if libc.prctl(option, second, third, zero, zero) != 0:
            raise OSError(ctypes.get_errno(), "the system call filter is refused")
