"""``python -m affectlens.cli``: the ``affectlens`` command where its script is not on the path."""

from __future__ import annotations

from affectlens.cli import main

if __name__ == "__main__":
    main()
