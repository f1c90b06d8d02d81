"""Verbs: parse, one library call, print."""
