"""The part of `why` that tells which variant was chosen, as a table.

Law of this file: a document in, lines out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_runtime.cli import output

if TYPE_CHECKING:
    from collections.abc import Mapping

    Document = Mapping[str, Any]

_VARIANTS = ("VARIANT", "VERDICT", "BACKEND", "DEVICE", ">RUN", ">+-", ">PRIVATE", "GOLDENS")


def text(reply: Document, now_s: float, width: int | None) -> list[str]:
    """Of a `why` answer: which variants may serve and what was measured of each, best first, and an
    empty line; nothing where there was nothing to decide. The variant that serves is marked when it
    is not the one that was chosen.
    """
    decision = reply.get("decision")
    if not decision:
        return []
    serving = ((reply.get("model") or {}).get("active") or {}).get("variant")
    left = {one["variant"]: one for one in decision.get("left") or []}
    tried = {one["variant"]: one for one in decision.get("tried") or []}
    order = [*(decision.get("order") or [])]
    names = order + [name for name in tried if name not in order]
    rows = [
        _row(
            tried.get(name) or {"variant": name},
            "left" if name in left else "serves" if name == serving != order[0] else "",
        )
        for name in names
    ]
    lines = [output.table(_VARIANTS, rows, width), output.printable(_how(decision, now_s))]
    for name in names:
        one = tried.get(name) or {}
        reason = left[name]["reason"] if name in left else one.get("reason")
        lines += [output.printable(f"{name}: {reason}")] if reason else []
    return [*lines, ""]


def _row(one: Document, role: str) -> tuple[Any, ...]:
    measured = one.get("run_ms_p50")
    goldens = one.get("goldens") or 0
    places = {str(place.get("device", "")) for place in one.get("placement") or []}
    backend = f"{one.get('backend', '?')} {one.get('backend_version') or ''}".strip()
    kept = f"{goldens} kept, {one.get('golden_deviation') or 0:.2g}" if goldens else "none"
    return (
        one["variant"],
        role or one.get("verdict", "?"),
        backend,
        "+".join(sorted(places)) or "-",
        f"{measured:.3f} ms" if measured else "-",
        f"{one.get('run_ms_spread') or 0:.3f}" if measured else "-",
        output.size(one.get("private_bytes")) if one.get("private_bytes") else "-",
        "refused" if one.get("verdict") == "wrong" else kept if one.get("loaded") else "-",
    )


def _how(decision: Document, now_s: float) -> str:
    """How it was decided, in a line."""
    parts = [f"decided {output.age(float(decision.get('decided_wall_s') or 0), now_s)}"]
    parts.append(f"by {decision.get('policy')}")
    if decision.get("rounds"):
        parts.append(f"{decision['rounds']} rounds in {decision.get('took_s') or 0:.1f} s")
        parts.append(f"differences under {decision.get('margin') or 0:.0%} count as none")
    if decision.get("reference"):
        parts.append(f"{decision['reference']} is the reference")
    return ", ".join(parts) + (f" ({decision['note']})" if decision.get("note") else "")
