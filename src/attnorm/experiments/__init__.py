"""Controlled experiments: each one command, resumable, with a report that it writes itself."""
