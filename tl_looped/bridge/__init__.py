"""The TransformerLens side: the only files that know its internals."""

from __future__ import annotations
