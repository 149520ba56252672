"""Where this package finds the files it ships: `Resources/` beside it in a checkout, inside it once
installed."""

from __future__ import annotations

from pathlib import Path

from CTSegLogic.values.errors import CTSegError


def resource(*parts: str) -> Path:
    """The path of a shipped file or folder, such as `resource("Labels", "structures.csv")`.

    Raises:
        CTSegError: the installation lacks it.
    """
    package = Path(__file__).resolve().parents[1]
    for root in (package / "Resources", package.parent / "Resources"):
        path = root.joinpath(*parts)
        if path.exists():
            return path
    raise CTSegError(
        seen=f"The installation lacks Resources/{'/'.join(parts)}.",
        hint="Install CTSegExtension again; its files are incomplete.",
    )
