"""The mail tool: which mails a reply sends, to whom, and why some are not sent.

The form is one that small models can write, and larger ones keep to it::

    <mail>
    to: Lena Achterberg, Omid Farzan
    subject: two boats
    The text, to the closing tag.
    </mail>

What is meant is taken where it is beyond doubt (other names of the tag, attributes or child tags for the head, bold heads,
``cc``, a head without any tag, a tag that is never closed), and nothing is guessed: who cannot be found is not written to. A
mail between the tags of a scratchpad is thought and not sent.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EVERYONE = "Everyone"
"""The name that stands for all people of a directory."""

_ALL = {"everyone", "everybody", "all", "all staff", "staff", "all employees", "all people", "the team", "team", "whole firm"}
_TAG = r"(?:send[ _-]?)?e?-?mails?"
_OPEN = re.compile(rf"<\s*{_TAG}\b([^<>]*)>", re.IGNORECASE)
_CLOSE = re.compile(rf"<\s*/\s*{_TAG}\s*>", re.IGNORECASE)
_THOUGHT = r"scratchpad(?:[ _-]?reasoning)?|think|thinking|thoughts?|reasoning"
_PAD = re.compile(rf"<\s*({_THOUGHT})\s*>(.*?)<\s*/\s*\1\s*>", re.IGNORECASE | re.DOTALL)
_PAD_END = re.compile(rf"\A(.*?)<\s*/\s*({_THOUGHT})\s*>", re.IGNORECASE | re.DOTALL)
_HEAD = re.compile(r"[\s>*_#-]*(to|cc|bcc|from|subject|body|text|message)[*_ ]*[:=][*_ ]*(.*)", re.IGNORECASE)
_CHILD = re.compile(r"\s*<\s*(to|cc|bcc|from|subject)\s*>\s*(.*?)\s*<\s*/\s*\1\s*>", re.IGNORECASE | re.DOTALL)
_BODY = re.compile(r"<\s*/?\s*(?:body|text|message)\s*>", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"""\b(to|cc|bcc|from|subject)\s*=\s*(?:"([^"]*)"|'([^']*)')""", re.IGNORECASE)
_BARE = re.compile(r"^[ \t*_]*to[*_ ]*:.*\n(?:[ \t*_]*cc[*_ ]*:.*\n)?[ \t*_]*subject[*_ ]*:", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Mail:
    """A mail that a reply holds.

    Args:
        to: Who gets it, as the directory calls them, :data:`EVERYONE` among them.
        unknown: Recipients that nobody knows: they get nothing.
        subject: Its subject.
        start, end: Which characters of the reply are its subject and text.
        refused: Why it is not sent, in words; empty when it is.
        whole: Whether it was closed. One that is not goes as far as the reply does.
    """

    to: tuple[str, ...]
    unknown: tuple[str, ...]
    subject: str
    start: int
    end: int
    refused: str = ""
    whole: bool = True

    @property
    def complaint(self) -> str:
        """What its sender has to be told: why it was not sent, or who did not get it; empty when all is well."""
        if self.refused:
            return self.refused
        return f"nobody here is called {_listed(self.unknown)}" if self.unknown else ""


def read_mails(reply: str, people: Mapping[str, str], *, sender: str) -> list[Mail]:
    """The mails of a reply, in order, those that are refused among them.

    Args:
        reply: All of it.
        people: Name to address of all who can be written to, :data:`EVERYONE` among them.
        sender: Whose mails they are.

    Example:
        >>> staff = {"Lena Achterberg": "lena@q.example", "Omid Farzan": "omid@q.example", "Everyone": "all@q.example"}
        >>> text = "Well. <mail>\\nto: lena, Bob\\nsubject: boats\\nTwo boats.\\n</mail>"
        >>> (mail,) = read_mails(text, staff, sender="Marlo")
        >>> mail.to, mail.complaint, text[mail.start : mail.end]
        (('Lena Achterberg',), "nobody here is called 'Bob'", 'boats\\nTwo boats.')
    """
    text = without_thoughts(reply)
    found = []
    for start, end, attributes, whole in _blocks(text):
        heads, at = _heads(text, start, end)
        heads = {name.lower(): one or two for name, one, two in _ATTRIBUTE.findall(attributes)} | heads
        mail = _mail(text, at, end, heads, people, sender, whole)
        if heads or mail.end > mail.start:  # an empty pair of tags is a second closing tag, written wrongly
            found.append(mail)
    return found


def without_thoughts(reply: str) -> str:
    """The reply with white space in place of its scratchpads, so that all else stands where it stood.

    Example:
        >>> without_thoughts("<think>ab</think>c")
        '                 c'
    """

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"\S", " ", match[0])

    text = _PAD.sub(blank, reply)
    # A template may have opened the thoughts that are closed here. A scratchpad that is closed behind a mail was never opened.
    closed = _PAD_END.match(text)
    if closed and (closed[2].lower().startswith("think") or not _OPEN.search(closed[1])):
        text = blank(closed) + text[closed.end() :]
    return text


def answer(mails: Sequence[Mail], people: Mapping[str, str]) -> str:
    """What the tool says to a reply's mails.

    Example:
        >>> answer([Mail(("Lena",), ("Bob",), "boats", 0, 9)], {"Lena": "lena@q.example"})
        "1. Sent to Lena. Not sent: nobody here is called 'Bob'.\\nNames: Lena. Write once more what was not sent, or say done."
    """
    lines = []
    for number, mail in enumerate(mails, start=1):
        sent = "" if mail.refused else f"Sent to {', '.join(mail.to)}."
        lines.append(" ".join([f"{number}.", *filter(None, [sent, mail.complaint and f"Not sent: {mail.complaint}."])]))
    return "\n".join([*lines, f"Names: {', '.join(people)}. Write once more what was not sent, or say done."])


def recipient(name: str, people: Mapping[str, str]) -> str | None:
    """Who of the directory is meant by a name or an address; None where that is nobody, or could be two.

    Example:
        >>> staff = {"Edda Korhan": "edda@q.example", "Joris Korhan": "joris@q.example", "Everyone": "all@q.example"}
        >>> [recipient(name, staff) for name in ("EDDA", "Joris <joris@q.example>", "Korhan", "all staff", "ed@q.example")]
        ['Edda Korhan', 'Joris Korhan', None, 'Everyone', None]
    """
    if "@" in name:
        address = re.search(r"[^\s<>()\"']+@[^\s<>()\"',;]+", name)
        return next((own for own, known in people.items() if address and known.lower() == address[0].lower()), None)
    plain = _plain(name)
    if plain in _ALL and EVERYONE in people:
        return EVERYONE
    whole = [own for own in people if _plain(own) == plain]
    part = [own for own in people if plain and plain in _plain(own).split()]
    return whole[0] if whole else part[0] if len(part) == 1 else None


def _blocks(text: str) -> list[tuple[int, int, str, bool]]:
    """Where the inside of each mail begins and ends, the attributes of its tag, and whether it was closed."""
    blocks, opened = [], list(_OPEN.finditer(text))
    for number, tag in enumerate(opened):
        limit = opened[number + 1].start() if number + 1 < len(opened) else len(text)
        closing = _CLOSE.search(text, tag.end(), limit)
        blocks.append((tag.end(), closing.start() if closing else limit, tag[1], closing is not None))
    if not blocks:  # heads without any tag: each goes up to the next
        edges = [*(match.start() for match in _BARE.finditer(text)), len(text)]
        blocks = [(a, b, "", True) for a, b in itertools.pairwise(edges)]
    return blocks


def _heads(text: str, start: int, end: int) -> tuple[dict[str, str], int]:
    """The heads of a mail, and where they end: where the subject begins, so that it is part of what is read."""
    heads: dict[str, str] = {}
    at, begins = start, start
    while at < end:
        stop = text.find("\n", at, end)
        stop = end if stop < 0 else stop
        line = text[at:stop]
        match = _CHILD.match(text, at, end) or _HEAD.fullmatch(text, at, stop)
        name = match[1].lower() if match else ""
        if match is None and line.strip():
            break
        if match is not None:
            if name in ("body", "text", "message"):
                heads.setdefault(name, "")
                begins = begins if "subject" in heads else match.start(2)
                break
            heads[name] = f"{heads[name]}, {match[2]}" if name in heads and name != "subject" else match[2].strip()
            begins = match.start(2) if name == "subject" else max(begins, match.end()) if "subject" not in heads else begins
            at = max(match.end(), at)
            at += at < end and text[at] == "\n"
        else:
            at = stop + 1
    return heads, begins


def _mail(text: str, start: int, end: int, heads: Mapping[str, str], people: Mapping[str, str], sender: str, whole: bool) -> Mail:
    inside = text[start:end]
    start, end = start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())
    end = max(start, end)
    wanted = [each for part in ("to", "cc", "bcc") for each in _split(heads.get(part, ""), people)]
    resolved = [(each, recipient(each, people)) for each in wanted]
    to = tuple(dict.fromkeys(own for _, own in resolved if own))
    unknown = tuple(dict.fromkeys(each for each, own in resolved if not own))
    subject, author = " ".join(heads.get("subject", "").split()), heads.get("from", "")
    words = _BODY.sub(" ", text[start:end])
    body = words[len(heads.get("subject", "")) :] if words.startswith(heads.get("subject", "")) else words
    refused = ""
    if author and recipient(author, {**people, sender: ""}) != sender:
        refused = f"it is from {author.strip()!r}, and you can only write as {sender}"
    elif not wanted:
        refused = "it has no line that begins with to:"
    elif not to:
        refused = f"nobody here is called {_listed(unknown)}"
    elif not re.search(r"\w", body):
        refused = "it has no text"
    return Mail(to, unknown, subject, start, end, refused, whole)


def _split(value: str, people: Mapping[str, str]) -> list[str]:
    """The single recipients of a head; brackets around a list, and "Korhan, Edda", are understood."""
    value = re.sub(r"\((?![^()]*@)[^()]*\)", "", value).strip().strip("[]{}").strip()
    last_first = re.fullmatch(r"([\w -]+),([\w -]+)", value)
    if last_first and _plain(turned := f"{last_first[2]} {last_first[1]}") in map(_plain, people):
        return [turned]
    parts = re.split(r"[;,&/|\n]|\band\b", value)
    return [part.strip(" \t\"'*_`.") for part in parts if re.search(r"\w", part)]


def _plain(name: str) -> str:
    """A name without accents, titles, signs and capitals."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c)).casefold()
    words = re.sub(r"[^\w\s-]", " ", bare).split()
    return " ".join(word for word in words if word not in ("mr", "mrs", "ms", "mx", "dr", "prof"))


def _listed(names: Sequence[str]) -> str:
    return " or ".join([*(repr(" ".join(name.split())[:40]) for name in names[:3]), *["another"] * (len(names) > 3)])
