"""Which sites can work together, by what they say of themselves. Pure functions over identities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedmed.federation.messages import Identity, code_hash

_SHARED = ("schema", "task", "classes", "channels", "image_size")  # what all sites of a run have in common


def plain_identity(node: int) -> Identity:
    """The identity of a plain Flower client, which cannot tell."""
    return Identity(f"node-{node}", "", (), (), (), "", 0, plain=True, node_id=node)


def agreed(identities: Sequence[Identity]) -> Identity | None:
    """The site to compare others with while none has a place: one of those that share the commonest facts, ties by name.

    Sites with other code and plain clients do not count; None without any that does.
    """
    able = sorted((i for i in identities if not i.plain and i.code_hash == code_hash()), key=lambda i: i.site)
    counts = Counter(_facts(i) for i in able)
    return max(able, key=lambda i: counts[_facts(i)], default=None)  # the first of equals


def misfit(identity: Identity, first: Identity | None) -> str | None:
    """Why a site cannot work with `first` (None: nobody yet), in one line, or None."""
    if identity.plain:
        return None
    if identity.code_hash != code_hash():
        return (
            f"site {identity.site!r} runs other code ({identity.code_hash}) than the server ({code_hash()}); "
            "install the same version at both ends"
        )
    if first is None:
        return None
    for field in _SHARED:
        mine, theirs = getattr(identity, field), getattr(first, field)
        if mine != theirs:
            return (
                f"sites differ in {field}: {first.site!r} has {_brief(theirs)}, {identity.site!r} has {_brief(mine)}; "
                "all sites of a run must agree"
            )
    return None


def _facts(identity: Identity) -> tuple[object, ...]:
    return tuple(getattr(identity, field) for field in _SHARED)


def _brief(value: object) -> str:
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else text[:77] + "..."
