"""Which register, variable or label a name means at one place of a kernel.

Inline assembly opens ``{ }`` scopes and declares the same names (``P1``, ``DONE``) in each of
them, so a name inside scope 3 becomes ``P1@3`` and every name of a kernel is unique.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cute_fa.ptx.operands import Operand, Reg, Vector

_DIGITS = "0123456789"
_COMPONENTS = ("xyzw", "rgba")


@dataclass(eq=False)
class Scope:
    """One ``{ }`` level of a kernel.

    Attributes:
        number: 0 for the kernel's own body, then counting up over the kernel.
        names: unique name of each register and variable declared here.
        families: (type, count) of each ``%r<100>``; members enter ``names`` on first use, so
            that a kernel's registers are the ones it has a use for.
        labels: unique name of each label that stands here.
        operands: parsed operands by their text: most operands of a kernel recur.
        registers: type of each register of the kernel that has a use; shared by its scopes.
        vectors: the elements of each vector register of the kernel; shared likewise.
    """

    number: int
    parent: Scope | None
    families: dict[str, tuple[str, int]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    operands: dict[str, Operand] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    vectors: dict[str, Vector] = field(default_factory=dict)

    def inner(self, number: int) -> Scope:
        """A scope that opens inside this one."""
        return Scope(number, self, registers=self.registers, vectors=self.vectors)

    def unique(self, name: str) -> str:
        """How ``name`` is called when it is declared in this scope."""
        return f"{name}@{self.number}" if self.number else name

    def label(self, name: str) -> str | None:
        """The unique name of the innermost visible label ``name``."""
        scope: Scope | None = self
        while scope is not None:
            found = scope.labels.get(name)
            if found is not None:
                return found
            scope = scope.parent
        return None

    def declare_vector(self, name: str, lanes: int, element_type: str) -> None:
        """Declare a vector register (PTX ISA section 5.4.2): one register per element.

        ``v`` means all of them, ``v.x`` or ``v.r`` the first, and so on.
        """
        elements = []
        for position in range(lanes):
            unique = self.unique(f"{name}.{_COMPONENTS[0][position]}")
            self.registers[unique] = element_type
            elements.append(Reg(unique))
            for alphabet in _COMPONENTS:
                self.names[f"{name}.{alphabet[position]}"] = unique
        self.names[name] = self.unique(name)
        self.vectors[self.unique(name)] = Vector(tuple(elements))

    def resolve(self, name: str) -> str | None:
        """The unique name of the innermost visible register or variable ``name``.

        The first use of a member of a family enters it in ``registers``.
        """
        scope: Scope | None = self
        while scope is not None:
            found = scope.names.get(name)
            if found is not None:
                return found
            if scope.families:
                stem = name.rstrip(_DIGITS)
                family = scope.families.get(stem)
                if family is not None:
                    digits = name[len(stem) :]
                    if digits and (digits[0] != "0" or digits == "0") and int(digits) < family[1]:
                        unique = scope.names[name] = scope.unique(name)
                        self.registers[unique] = family[0]
                        return unique
            scope = scope.parent
        return None
