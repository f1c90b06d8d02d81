"""Generations → rows → parts → commit. A part exists when it is committed."""
