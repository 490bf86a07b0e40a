"""The rule of imports, as pyproject.toml writes it down for import-linter."""

from __future__ import annotations

from pathlib import Path

from importlinter import cli


def test_packages_import_what_stands_below_them(monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[1])
    kept = cli.lint_imports(no_cache=True) == 0
    assert kept, capsys.readouterr().out
