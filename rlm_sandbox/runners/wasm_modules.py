"""The modules a guest of the ``wasm`` backend can import: imported once, when the component is built."""

from __future__ import annotations

from typing import Final

__all__ = ("MODULES", "PACKAGES", "PRIVATE")

MODULES: Final = (
    "__future__", "abc", "annotationlib", "argparse", "array", "ast", "asyncio", "asyncio.taskgroups", "asyncio.timeouts",
    "atexit", "base64", "bdb", "binascii", "bisect", "builtins", "cProfile", "calendar", "cmath", "cmd", "code", "codecs",
    "codeop", "collections", "collections.abc", "colorsys", "compileall", "compression.gzip", "compression.zlib", "concurrent",
    "concurrent.futures", "concurrent.futures.thread", "configparser", "contextlib", "contextvars", "copy", "copyreg", "csv",
    "dataclasses", "datetime", "dbm", "decimal", "difflib", "dis", "doctest", "email", "email.message", "email.mime.multipart",
    "email.mime.text", "email.parser", "email.policy", "email.utils", "encodings", "encodings.ascii", "encodings.base64_codec",
    "encodings.big5", "encodings.cp1250", "encodings.cp1251", "encodings.cp1252", "encodings.cp437", "encodings.euc_jp",
    "encodings.gb18030", "encodings.gbk", "encodings.hex_codec", "encodings.idna", "encodings.iso8859_1", "encodings.iso8859_15",
    "encodings.koi8_r", "encodings.latin_1", "encodings.mac_roman", "encodings.punycode", "encodings.raw_unicode_escape",
    "encodings.rot_13", "encodings.shift_jis", "encodings.unicode_escape", "encodings.utf_16", "encodings.utf_16_be",
    "encodings.utf_16_le", "encodings.utf_32", "encodings.utf_32_be", "encodings.utf_32_le", "encodings.utf_7", "encodings.utf_8",
    "encodings.utf_8_sig", "encodings.zlib_codec", "enum", "errno", "faulthandler", "filecmp", "fileinput", "fnmatch",
    "fractions", "ftplib", "functools", "gc", "genericpath", "getopt", "getpass", "gettext", "glob", "graphlib", "gzip",
    "hashlib", "heapq", "hmac", "html", "html.entities", "html.parser", "http", "http.client", "http.cookies", "imaplib",
    "importlib", "importlib.abc", "importlib.machinery", "importlib.metadata", "importlib.resources", "importlib.util", "inspect",
    "io", "ipaddress", "itertools", "json", "json.decoder", "json.encoder", "json.tool", "keyword", "linecache", "locale",
    "logging", "logging.config", "logging.handlers", "mailbox", "marshal", "math", "mimetypes", "modulefinder", "multiprocessing",
    "netrc", "ntpath", "nturl2path", "numbers", "opcode", "operator", "optparse", "os", "os.path", "pathlib", "pdb", "pickle",
    "pickletools", "pkgutil", "platform", "plistlib", "poplib", "posix", "posixpath", "pprint", "profile", "pstats", "py_compile",
    "pyclbr", "pydoc", "pyexpat", "queue", "quopri", "random", "re", "reprlib", "rlcompleter", "runpy", "sched", "secrets",
    "select", "selectors", "shelve", "shlex", "shutil", "signal", "site", "smtplib", "socket", "socketserver", "sqlite3",
    "sre_compile", "sre_constants", "sre_parse", "stat", "statistics", "string", "string.templatelib", "stringprep", "struct",
    "subprocess", "symtable", "sys", "sysconfig", "tabnanny", "tarfile", "tempfile", "textwrap", "threading", "time", "timeit",
    "token", "tokenize", "tomllib", "trace", "traceback", "tracemalloc", "types", "typing", "unicodedata", "unittest",
    "unittest.case", "unittest.mock", "urllib", "urllib.error", "urllib.parse", "urllib.request", "urllib.robotparser", "uuid",
    "warnings", "wave", "weakref", "webbrowser", "wsgiref", "wsgiref.util", "xml", "xml.dom.minidom", "xml.etree.ElementTree",
    "xml.sax", "xml.sax.handler", "xml.sax.saxutils", "xmlrpc", "xmlrpc.client", "zipapp", "zipfile", "zipimport", "zlib",
    "zoneinfo",
)  # fmt: skip
#: Packages whose modules are imported, too: they import each other when they are used.
PACKAGES: Final = (
    "asyncio", "collections", "compression", "concurrent", "email", "encodings", "html", "http", "importlib", "json", "logging",
    "pathlib", "re", "sqlite3", "string", "sysconfig", "unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zipfile", "zoneinfo",
)  # fmt: skip
#: What modules of the list import when they are used; not every build of the interpreter has each.
PRIVATE: Final = (
    "_abc", "_ast", "_ast_unparse", "_asyncio", "_bisect", "_blake2", "_codecs", "_codecs_cn", "_codecs_hk", "_codecs_iso2022",
    "_codecs_jp", "_codecs_kr", "_codecs_tw", "_collections", "_collections_abc", "_colorize", "_compat_pickle", "_contextvars",
    "_csv", "_datetime", "_decimal", "_elementtree", "_frozen_importlib", "_frozen_importlib_external", "_functools", "_heapq",
    "_imp", "_io", "_json", "_locale", "_lsprof", "_markupbase", "_md5", "_multibytecodec", "_opcode", "_opcode_metadata",
    "_operator", "_pickle", "_py_abc", "_py_warnings", "_pydatetime", "_pydecimal", "_pyio", "_queue", "_random", "_sha1",
    "_sha3", "_signal", "_sitebuiltins", "_socket", "_sqlite3", "_sre", "_stat", "_statistics", "_string", "_strptime", "_struct",
    "_symtable", "_thread", "_threading_local", "_tokenize", "_tracemalloc", "_typing", "_warnings", "_weakref", "_weakrefset",
    "_zoneinfo",
)  # fmt: skip
