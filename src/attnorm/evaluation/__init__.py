"""Scores that can be trusted: what is measured is frozen in a manifest, and how is written beside each number."""
