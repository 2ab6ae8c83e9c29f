"""einsum equations that are a product of query and key, or one of probabilities and value."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import NamedTuple

from torch import Tensor


class Equation(NamedTuple):
    """Labels of both operands and of the result, an ellipsis written out."""

    left: str
    right: str
    out: str

    @property
    def swapped(self) -> Equation:
        return Equation(self.right, self.left, self.out)


class Mixing(NamedTuple):
    """Labels by role in a product of probabilities (lead, query_token, key_token) and value (lead, key_token, ...)."""

    lead: str
    query: str
    key: str
    channel: str


def parse(text: str, operands: Sequence[Tensor]) -> Equation | None:
    """The equation; None where it has no arrow, not two operands, or takes a diagonal."""
    inputs, arrow, out = text.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if not arrow or len(parts) != 2:
        return None
    spare = "".join(letter for letter in ascii_uppercase if letter not in text)
    counts = [operand.dim() - len(part.replace("...", "")) for part, operand in zip(parts, operands, strict=True)]
    widest = max((count for part, count in zip(parts, counts, strict=True) if "..." in part), default=0)
    letters = spare[:widest]
    left, right = (
        part.replace("...", letters[widest - count :] if count else "")
        for part, count in zip(parts, counts, strict=True)
    )
    found = Equation(left, right, out.replace("...", letters))
    return None if any(len(set(labels)) < len(labels) for labels in found) else found


def query_and_key(equation: Equation, operands: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Query (*lead, query_token, channel) and key where the result is (*lead, query_token, key_token)."""
    first, second = operands
    lead, last = equation.out[:-2], equation.out[-2:]
    if len(last) == 2 and last[0] in equation.right and last[0] not in equation.left:
        equation, first, second = equation.swapped, second, first
    if len(last) < 2 or not _only(last[0], equation.left, equation.right) or not _only(last[1], *equation[1::-1]):
        return None
    channel = "".join(label for label in equation.left if label in equation.right and label not in equation.out)
    known = set(lead + last + channel)
    if not channel or set(equation.left) - known or set(equation.right) - known:
        return None
    return arranged(first, equation.left, lead, last[0], channel), arranged(
        second, equation.right, lead, last[1], channel
    )


def _only(label: str, inside: str, outside: str) -> bool:
    return label in inside and label not in outside


def mixing(equation: Equation, flipped: bool) -> Mixing | None:
    """Roles where the left operand's last two axes are query and key (key and query if flipped) and mix the right."""
    if len(equation.left) < 2:
        return None
    lead, query, key = equation.left[:-2], equation.left[-2], equation.left[-1]
    if flipped:
        query, key = key, query
    channel = "".join(label for label in equation.out if label in equation.right and label not in equation.left)
    sums_over_keys = key in equation.right and key not in equation.out and query not in equation.right
    if not sums_over_keys or not channel or set(equation.out) != set(lead + query + channel):
        return None
    return Mixing(lead, query, key, channel)


def arranged(tensor: Tensor, labels: str, lead: str, token: str, channel: str) -> Tensor:
    """Axes in the order (*lead, token, channel); length one where the tensor lacks a leading axis."""
    present = [label for label in lead if label in labels]
    tensor = tensor.permute([labels.index(label) for label in (*present, token, *channel)])
    for place, label in enumerate(lead):
        if label not in labels:
            tensor = tensor.unsqueeze(place)
    return tensor.flatten(len(lead) + 1)
