"""A finding as text, the same under every table."""

from __future__ import annotations

from rich.text import Text

from gainstage.findings import Finding


def finding_text(finding: Finding) -> Text:
    """Kind and place, evidence, remedy."""
    return Text.assemble(
        (f"{finding.kind}: {finding.where or 'the model'}", "bold red"), f"\n  {finding.evidence}\n  → {finding.remedy}"
    )
