"""The topic of each module of the standard library, after the chapters of the library reference.

Small chapters are joined with their neighbours so that every topic has examples enough. A module that is not
listed (of another Python version) is left out of the data set, never guessed.
"""

from __future__ import annotations

_MODULES = {
    # Text Processing; Binary Data; Internationalization
    "text_processing": """
        string re difflib textwrap unicodedata stringprep readline rlcompleter struct codecs encodings gettext
        locale sre_compile sre_constants sre_parse
    """,
    # Built-in Types and Exceptions; Data Types
    "data_types": """
        builtins datetime zoneinfo calendar collections heapq bisect array weakref copy pprint reprlib enum
        graphlib
    """,
    # Numeric and Mathematical Modules; Functional Programming
    "numeric_and_functional": """
        numbers math cmath decimal fractions random statistics itertools functools operator
    """,
    # File and Directory Access; Persistence; Compression and Archiving; File Formats; Multimedia
    "files_and_storage": """
        pathlib posixpath ntpath genericpath nturl2path fileinput stat filecmp tempfile glob fnmatch linecache
        shutil pickle copyreg shelve marshal dbm sqlite3 zlib gzip bz2 lzma zipfile tarfile compression csv
        configparser tomllib netrc plistlib xdrlib aifc audioop chunk colorsys imghdr sndhdr sunau wave
        ossaudiodev winsound
    """,
    # Concurrent Execution; Asynchronous I/O
    "concurrency": """
        threading multiprocessing concurrent subprocess sched queue contextvars asyncio asynchat asyncore
        select selectors signal
    """,
    # Networking; Internet Protocols and Support; Cryptographic Services
    "networking": """
        socket ssl socketserver webbrowser wsgiref urllib http ftplib poplib imaplib smtplib smtpd nntplib
        telnetlib uuid xmlrpc ipaddress cgi cgitb hashlib hmac secrets crypt
    """,
    # Internet Data Handling; Structured Markup
    "internet_data": """
        email json mailbox mailcap mimetypes base64 binascii quopri uu html xml
    """,
    # Graphical User Interfaces; Terminal Interfaces; Turtle Graphics; IDLE
    "user_interfaces": """
        tkinter turtle turtledemo curses idlelib
    """,
    # Development Tools; Debugging and Profiling; Software Packaging
    "development_tools": """
        pydoc pydoc_data doctest unittest lib2to3 bdb faulthandler pdb profile cProfile pstats profiling
        timeit trace tracemalloc distutils ensurepip venv zipapp
    """,
    # Python Runtime Services; Custom Interpreters; Importing Modules; Language Services; Typing
    "runtime_and_language": """
        sys sysconfig warnings dataclasses contextlib abc atexit traceback gc inspect annotationlib site code
        codeop zipimport pkgutil modulefinder runpy importlib imp ast symtable token keyword tokenize tabnanny
        pyclbr py_compile compileall dis opcode pickletools typing types __future__ antigravity this
    """,
    # Generic Operating System Services; Unix and Windows Specific Services; Program Frameworks
    "operating_system": """
        os io time logging platform errno ctypes argparse optparse getopt getpass cmd shlex pwd grp
        spwd termios tty pty fcntl resource syslog pipes mmap nis msvcrt winreg msilib
    """,
}

TOPICS = tuple(_MODULES)
"""The topics, in the order of the library reference."""

TOPIC_OF = {module: topic for topic, modules in _MODULES.items() for module in modules.split()}
"""The topic of each public top-level module."""

PUBLIC_NAME = {
    "_aix_support": "sysconfig",
    "_ast": "ast",
    "_ast_unparse": "ast",
    "_apple_support": "sysconfig",
    "_android_support": "sysconfig",
    "_blake2": "hashlib",
    "_bootsubprocess": "distutils",
    "_collections_abc": "collections",
    "_colorize": "traceback",
    "_compat_pickle": "pickle",
    "_compression": "gzip",
    "_curses_panel": "curses",
    "_elementtree": "xml",
    "_frozen_importlib": "importlib",
    "_frozen_importlib_external": "importlib",
    "_gdbm": "dbm",
    "_imp": "importlib",
    "_interpchannels": "concurrent",
    "_interpqueues": "concurrent",
    "_interpreters": "concurrent",
    "_ios_support": "sysconfig",
    "_lsprof": "profile",
    "_markupbase": "html",
    "_md5": "hashlib",
    "_msi": "msilib",
    "_multibytecodec": "codecs",
    "_opcode": "dis",
    "_opcode_metadata": "dis",
    "_osx_support": "sysconfig",
    "_overlapped": "asyncio",
    "_posixshmem": "multiprocessing",
    "_posixsubprocess": "subprocess",
    "_py_abc": "abc",
    "_py_warnings": "warnings",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "_pylong": "builtins",
    "_pyrepl": "code",
    "_remote_debugging": "pdb",
    "_scproxy": "urllib",
    "_sha1": "hashlib",
    "_sha2": "hashlib",
    "_sha256": "hashlib",
    "_sha3": "hashlib",
    "_sha512": "hashlib",
    "_sitebuiltins": "site",
    "_sre": "re",
    "_strptime": "time",
    "_suggestions": "traceback",
    "_sysconfig": "sysconfig",
    "_thread": "threading",
    "_threading_local": "threading",
    "_weakrefset": "weakref",
    "_winapi": "subprocess",
    "_zstd": "compression",
    "nt": "os",
    "posix": "os",
    "pyexpat": "xml",
    "_wmi": "platform",
}
"""The public module that a private one implements, where more than a leading underscore differs."""

# Private modules that belong to no chapter, or hold tables rather than prose.
LEFT_OUT = frozenset({"_codecs_cn", "_codecs_hk", "_codecs_iso2022", "_codecs_jp", "_codecs_kr", "_codecs_tw"})


def public_name(module: str) -> str:
    """Return the public top-level module that ``module`` belongs to."""
    return PUBLIC_NAME.get(module) or (module if module in TOPIC_OF else module.removeprefix("_"))
