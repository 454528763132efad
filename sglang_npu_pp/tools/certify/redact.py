"""Nothing that is written names the machine, its user or its network, or holds a key.

Known values (of secret arguments and variables, host names, the user) are replaced wherever they stand; what
only looks like a path, an address or a key is replaced, too. In doubt more is taken out than needed. Of a
path the last part stays, since it names a model or a file.
"""

from __future__ import annotations

import dataclasses
import enum
import getpass
import ipaddress
import json
import re
import socket
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

HIDDEN, HOST, ADDRESS, USER, PATH = "<hidden>", "<host>", "<address>", "<user>", "<path>"

_Value = TypeVar("_Value")

_PLACEHOLDER = "<(?:hidden|host|address|user|path)>"
_GENERIC_USERS = {"root", "user", "admin", "ubuntu", "docker", "sglang", "python", "hwhiaiuser", "ma-user"}
_GENERIC_HOSTS = {"localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback", "broadcasthost"}
_PUBLIC_HOSTS = (".github.com", ".huggingface.co", ".pypi.org", ".pytorch.org", ".sglang.ai", ".hiascend.com")
_HOSTS_FILE = Path("/etc/hosts")
_LONGEST_ADDRESS = 64  # characters, with what may stand around it
_PASSES = 8  # over a text; two are usual
_LEAST_SECRET = 6  # characters: a shorter secret is replaced as a whole word only


# --- names of arguments ----------------------------------------------------------------------------


_SECRET_PARTS = {
    *("key", "apikey", "keyfile", "secret", "password", "passwd", "credential", "credentials"),
    *("auth", "authorization", "header", "headers", "bearer", "cookie"),
}
_SECRET_ARGUMENTS = ("api-key", "admin-api-key", "ssl-keyfile-password")  # argparse takes abbreviations
_HOST_PARTS = {"host", "hosts", "addr", "address", "ip", "url", "urls"}


def _is_secret(name: str) -> bool:
    """Whether the value of `--name`, of a variable or of a key in JSON must not be seen."""
    plain = name.lstrip("-").lower().replace("_", "-")
    parts = plain.split("-")
    if not _SECRET_PARTS.isdisjoint(parts) or parts[-1] == "token":
        return True
    return len(name) > 4 and name.startswith("--") and any(s.startswith(plain) for s in _SECRET_ARGUMENTS)


def _is_host(name: str) -> bool:
    return name.lstrip("-").lower().replace("_", "-").split("-")[-1] in _HOST_PARTS


def _with_values(arguments: Iterable[str]) -> Iterator[tuple[str, str | None, bool]]:
    """(name, value, whether it was `--name=value`); a name may have several values, or None."""
    name = ""
    for each in arguments:
        if each.startswith("--"):
            name, equals, value = each.partition("=")
            yield name, value if equals else None, bool(equals)
        else:
            yield name, each, False


# --- patterns ----------------------------------------------------------------------------------------


_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PART = rf"(?:{_PLACEHOLDER}|[^\s/'\"`<>])"
_PLACES = re.compile(
    rf"(?P<url>\b[A-Za-z][A-Za-z0-9+.-]*://(?:{_PLACEHOLDER}|[^\s'\"`<>])+)"
    rf"|(?P<quote>['\"`])(?P<quoted>(?:~|\.{{0,2}}|{_PLACEHOLDER})/[^'\"`\n]*/[^'\"`\n]*)(?P=quote)"
    rf"|(?P<path>(?<![\w.~-])(?:{_PLACEHOLDER}|[\w.~-])*(?:/+{_PART}+){{2,}}/*|(?<![\w.])(?:~[\w.-]*|\.{{1,2}})/+{_PART}+/*)"
)
_SECRET_IN_TEXT = re.compile(
    r"(?i)(?P<name>\b(?:[a-z]+[_-])*(?:api[_-]?key|secret(?:[_-]?key)?|password|passwd|authorization"
    r"|(?:hf|access|auth|bearer)[_-]?token))(?P<between>['\"]?\s*[:=]\s*['\"]?)"
    r"(?P<scheme>(?:bearer|basic)\s+)?(?P<value>[^\s'\",;)}\]]+)"
)
_ARGUMENT_IN_TEXT = re.compile(
    r"(?P<name>--[a-z][\w-]*)(?P<between>=|\s+|['\"],\s*['\"])(?P<value>(?<==)[^\s'\",]+|[^\s'\",-][^\s'\",]*)"
)
_KEYS = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}|\bsk-[\w-]{8,}|\bgh[a-z]_\w{16,}|\bAKIA[0-9A-Z]{12,}|\beyJ[\w-]{8,}[\w.-]*"
    r"|(?<=[Bb]earer )[^\s'\",<]{4,}"
)
_HARDWARE = re.compile(r"(?<![0-9A-Fa-f:])(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}(?![0-9A-Fa-f:])")
_IPV6 = re.compile(
    r"(?:(?<![\w:])|(?<=\w)(?=:))(?=[0-9A-Fa-f]*:[0-9A-Fa-f]*:)"
    r"(?:[0-9A-Fa-f:]*:\d+(?:\.\d+){3}|[0-9A-Fa-f:]+)(?:%[\w.-]+)?(?!\w)"
)
_IPV4 = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?!\.?\d)")
_NAMED_ADDRESS = re.compile(r"\bip(?:-\d{1,3}){4}\b(?:\.[\w.-]*\w)?")
_PRIVATE_DOMAIN = re.compile(
    r"(?i)(?<![\w.-])[a-z0-9][\w.-]*\.(?:local|localdomain|internal|intranet|lan|corp|cluster|home\.arpa)\b"
)


class Redactor:
    """Takes out of texts what `known` maps to a placeholder, and what its kind gives away."""

    def __init__(self, known: Mapping[str, str]) -> None:
        secrets = {text for text, placeholder in known.items() if placeholder in (HIDDEN, PATH)}
        self._known = {text.lower(): placeholder for text, placeholder in known.items()}
        self._secrets = _any_of(secrets, whole_below=_LEAST_SECRET)
        self._names = _any_of(set(known) - secrets)

    def text(self, text: str) -> str:
        """Until nothing changes: beside a placeholder, more may look like a path or an address."""
        for _ in range(_PASSES):
            text, before = self._once(text), text
            if text == before:
                break
        return text

    def _once(self, text: str) -> str:
        text = self._secrets.sub(self._placeholder, _COLOURS.sub("", text))
        text = _SECRET_IN_TEXT.sub(r"\g<name>\g<between>\g<scheme>" + HIDDEN, text)
        text = _KEYS.sub(HIDDEN, _ARGUMENT_IN_TEXT.sub(_hidden_if_secret, text))
        text = _PLACES.sub(_shorter, text)
        text = _HARDWARE.sub(ADDRESS, text)
        text = _IPV4.sub(_address, _IPV6.sub(_address, text))
        text = _PRIVATE_DOMAIN.sub(HOST, _NAMED_ADDRESS.sub(HOST, text))
        return self._names.sub(self._placeholder, text)

    def arguments(self, arguments: Iterable[str]) -> list[str]:
        """Of a command line: `--model-path /a/b/c` -> `--model-path <path>/c`."""
        found = []
        for name, value, joined in _with_values(arguments):
            if value is None:
                found.append(self.text(name))
            else:
                shown = self._value(name, value)
                found.append(f"{self.text(name)}={shown}" if joined else shown)
        return found

    def _value(self, name: str, value: str) -> str:
        if _is_secret(name):
            return HIDDEN
        if _is_host(name):
            return self._host(value)
        if value.lstrip()[:1] in ("{", "["):
            with suppress(ValueError):
                return json.dumps(self._structure(json.loads(value)))
        return self.text(_last_part(value) if _is_path(value) else value)

    def _host(self, value: str) -> str:
        """The port of host:port stays."""
        port = re.search(r"(?:^[^:]*|\]|//[^:]*)(:\d+)$", value)
        return f"{HOST}{port[1]}" if port else HOST

    def _structure(self, value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {self.text(key): self._structure(each, key) for key, each in value.items()}
        if isinstance(value, list):
            return [self._structure(each, name) for each in value]
        if isinstance(value, str):
            return self._value(name, value)
        return HIDDEN if _is_secret(name) else value

    def everything(self, value: _Value) -> _Value:
        """A copy of plain values (dataclasses, sequences, mappings) with every text redacted.

        A field `arguments` is a command line.
        """
        return self._copy(value)

    def _copy(self, value: Any) -> Any:
        if isinstance(value, str) and not isinstance(value, enum.Enum):
            return self.text(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return dataclasses.replace(
                value,
                **{
                    name: self.arguments(each) if name == "arguments" else self._copy(each)
                    for name, each in fields.items()
                },
            )
        if isinstance(value, Mapping):
            return {self._copy(key): self._copy(each) for key, each in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            return [self._copy(each) for each in value]
        return value

    def _placeholder(self, match: re.Match[str]) -> str:
        return match[0] if re.fullmatch(_PLACEHOLDER, match[0]) else self._known[match[0].lower()]


def redactor(arguments: Sequence[str], environ: Mapping[str, str]) -> Redactor:
    """For this machine, and a server with these arguments and variables."""
    known: dict[str, str] = {}
    for name in (*_host_names(), *_hosts_in(arguments)):
        known[name] = HOST
    known.update((name, USER) for name in _users(environ))
    known.update((path, PATH) for path in _paths_with_spaces(arguments, environ))
    for secret in (*_secrets_in(arguments), *_secrets_of(environ)):
        known.update((spelling, HIDDEN) for spelling in _spellings(secret))
    return Redactor({text: placeholder for text, placeholder in known.items() if text.strip()})


# --- what is known -----------------------------------------------------------------------------------


def _host_names() -> set[str]:
    """Of this machine, and of those in its hosts file, which are its neighbours."""
    names = {socket.gethostname(), socket.getfqdn()}
    with suppress(OSError):
        for line in _HOSTS_FILE.read_text(errors="replace").splitlines():
            names.update(line.partition("#")[0].split()[1:])
    names |= {name.partition(".")[0] for name in names}
    return {name for name in names if name.lower() not in _GENERIC_HOSTS and not name.isdecimal()}


def _hosts_in(arguments: Sequence[str]) -> Iterator[str]:
    for name, value, _ in _with_values(arguments):
        if value is not None and _is_host(name):
            network = re.sub(r"^\w+://", "", value).partition("/")[0].rpartition("@")[2]
            host = re.sub(r":\d+$", "", network)
            if host.lower() not in _GENERIC_HOSTS and not re.fullmatch(r"[\d.:\[\]]*", host):
                yield host


def _users(environ: Mapping[str, str]) -> set[str]:
    names = {environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    with suppress(OSError, KeyError, ImportError):
        names.add(getpass.getuser())
    if home := environ.get("HOME", ""):
        names.add(Path(home).name)
    return {name for name in names if len(name) > 1 and name.lower() not in _GENERIC_USERS}


def _paths_with_spaces(arguments: Sequence[str], environ: Mapping[str, str]) -> Iterator[str]:
    """Folders that no pattern finds in a sentence."""
    folders = [str(Path(value).parent) for _, value, _ in _with_values(arguments) if value is not None]
    for text in (*folders, environ.get("HOME", ""), environ.get("TMPDIR", "")):
        if text.startswith("/") and " " in text:
            yield text


def _secrets_in(arguments: Sequence[str]) -> Iterator[str]:
    for name, value, _ in _with_values(arguments):
        if value is None:
            continue
        if _is_secret(name):
            yield value
            yield from (part for part in re.split(r"[=:\s]+", value) if len(part) >= _LEAST_SECRET)
        elif value.lstrip()[:1] in ("{", "["):
            with suppress(ValueError):
                yield from _secrets_of_structure(json.loads(value), name)


def _secrets_of_structure(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _secrets_of_structure(each, key)
    elif isinstance(value, list):
        for each in value:
            yield from _secrets_of_structure(each, name)
    elif isinstance(value, str) and _is_secret(name):
        yield value


def _secrets_of(environ: Mapping[str, str]) -> Iterator[str]:
    for name, value in environ.items():
        if len(value) >= _LEAST_SECRET and not value.startswith("/") and _is_secret(name):
            yield value


def _spellings(secret: str) -> set[str]:
    """As it may stand in a log, too."""
    return {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], urllib.parse.quote(secret, safe="")}


def _any_of(texts: Iterable[str], whole_below: int | None = None) -> re.Pattern[str]:
    """One of these texts, the longest first, or a placeholder, which stays one.

    Texts of fewer than `whole_below` characters are found as whole words only; without it, all are.
    """
    words = [_PLACEHOLDER]
    for text in sorted(set(texts), key=len, reverse=True):
        is_word = whole_below is None or len(text) < whole_below
        begin = r"(?<![A-Za-z0-9])" if is_word else ""
        end = r"(?![A-Za-z0-9])" if is_word else ""
        words.append(f"{begin}{re.escape(text)}{end}")
    return re.compile("|".join(words), re.IGNORECASE)


# --- replacements ------------------------------------------------------------------------------------


def _hidden_if_secret(match: re.Match[str]) -> str:
    value = HIDDEN if _is_secret(match["name"]) else match["value"]
    return f"{match['name']}{match['between']}{value}"


def _shorter(match: re.Match[str]) -> str:
    if match["url"] is not None:
        return _url(match["url"])
    if match["quoted"] is not None:
        return f"{match['quote']}{_last_part(match['quoted'])}{match['quote']}"
    return _last_part(match["path"])


def _is_path(value: str) -> bool:
    """Whether the value of an argument is a path, and not the name of a model on a hub."""
    if "/" not in value:
        return False
    if value.startswith(("/", "~", ".")):
        return True
    with suppress(OSError, ValueError):
        return Path(value).exists()
    return False


def _last_part(path: str) -> str:
    """`/a/b/c` -> `<path>/c`; `/c` stays."""
    parts = [part for part in path.split("/") if part]
    if not parts or (path.startswith("/") and len(parts) < 2):
        return path
    if len(parts) == 2 and parts[0] in ("home", "Users"):
        return f"{PATH}/{USER}"
    return f"{PATH}/{parts[-1]}"


def _url(url: str) -> str:
    scheme, _, rest = url.partition("://")
    network, slash, path = rest.partition("/")
    network = network.rpartition("@")[2]
    if scheme in ("http", "https") and f".{network.lower()}".endswith(_PUBLIC_HOSTS):
        return f"{scheme}://{network}{slash}{path.partition('?')[0]}"
    port = re.search(r":\d+$", network)
    host = f"{HOST}{port[0] if port else ''}" if network else ""
    return f"{scheme}://{host}{slash}{_last_part(slash + path.partition('?')[0]).lstrip('/')}"


def _address(match: re.Match[str]) -> str:
    """The candidate hidden, if one is inside, between colons and ports that are not its own."""
    text = match[0].partition("%")[0]
    for begin, end in _between_colons(text):
        inside = text[begin:end]
        if re.fullmatch(r"(?:::\d*)?", inside):  # a slice, or an address that all machines have
            continue
        with suppress(ValueError):
            ipaddress.ip_address(inside)
            return f"{text[:begin]}{ADDRESS}{text[end:]}"
    return match[0]


def _between_colons(text: str) -> list[tuple[int, int]]:
    """Begin and end of all of it and of its parts that end at colons, the longest first."""
    colons = [place for place, character in enumerate(text[:_LONGEST_ADDRESS]) if character == ":"]
    begins = sorted({0, *colons, *(place + 1 for place in colons)})
    ends = sorted({len(text), *colons, *(place + 1 for place in colons)})
    parts = [(begin, end) for begin in begins for end in ends if begin < end]
    return sorted(parts, key=lambda part: part[0] - part[1])
